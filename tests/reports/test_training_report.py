"""The tables show the figures of the report in the right cells."""

import re

from rich.console import Console

from dylo_moe.reports.training_report import TrainingReport, training_table

REPORT = TrainingReport(
    domains=["python", "cpp"],
    experts=["expert_0", "expert_1"],
    base={"loss/python": 2.0, "loss/cpp": 4.0},
    mixture={
        "loss/python": 1.5,
        "loss/cpp": 4.4,
        "usage/python/expert_0": 0.25,
        "usage/python/expert_1": 0.75,
        "usage/cpp/expert_0": 0.6,
        "usage/cpp/expert_1": 0.4,
    },
    trainable_parameters=12_345,
    base_parameters=1_000_000,
    checkpoint="out/best_model",
    steps=7,
    train_tokens=8_901,
    train_seconds=90.0,
    routing="prefix:1",
    held_out_rows=23,
    versions={},
    seed=0,
)


def rendered() -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(training_table(REPORT))
    return captured.get()


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each table row, by its first cell."""
    cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def test_losses_are_shown_with_their_change() -> None:
    table = rows(rendered())
    assert table["python"] == ["2.000", "1.500", "-25.0%"]
    assert table["cpp"] == ["4.000", "4.400", "+10.0%"], "a rise must be shown"


def test_usage_has_a_row_per_expert_and_a_column_per_domain() -> None:
    table = rows(rendered())
    assert table["expert_0"] == ["25.0%", "60.0%"]
    assert table["expert_1"] == ["75.0%", "40.0%"]


def test_parameters_are_shown_as_number_and_share() -> None:
    text = rendered()
    assert "12,345 parameters, 1.23% of the base's 1,000,000" in text
    assert "7 steps, 8,901 tokens, 1.5 min" in text
    assert "out/best_model" in text
