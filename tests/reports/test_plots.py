"""The plots show the logged values."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from dylo_moe.reports.plots import curves, training_curves

HISTORY: list[dict[str, Any]] = [
    {"step": 10, "loss": 3.0, "grad_norm": 5.0, "grad_norm/expert_0": 3.0, "grad_norm/router": 4.0},
    {"step": 10, "eval_loss": 2.0, "eval_loss/a": 1.5, "eval_loss/b": 2.5, "eval_usage/a/expert_0": 1.0},
    {"step": 20, "grad_norm/expert_0": 2.0, "expert_usage/expert_0": 0.4, "expert_usage/a/expert_0": 0.9},
    {"step": 20, "eval_loss/a": 1.0, "eval_loss/b": 2.0},
    {"step": 20, "train_loss": 2.5},
]


def test_curves_hold_the_logged_values_by_step() -> None:
    assert curves(HISTORY, "eval_loss") == {"a": ([10, 20], [1.5, 1.0]), "b": ([10, 20], [2.5, 2.0])}
    assert curves(HISTORY, "expert_usage") == {"expert_0": ([20], [0.4])}
    assert curves(HISTORY, "grad_norm") == {"expert_0": ([10, 20], [3.0, 2.0]), "router": ([10], [4.0])}


def test_each_panel_shows_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    training_curves(HISTORY, tmp_path / "curves.png")
    loss, usage, norms = pyplot.gcf().axes
    monkeypatch.undo()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line.get_label() for line in loss.lines] == ["a", "b"]
    assert list(loss.lines[0].get_ydata()) == [1.5, 1.0]
    assert [line.get_label() for line in usage.lines] == ["expert_0"]
    assert [line.get_label() for line in norms.lines] == ["expert_0", "router"]
    pyplot.close("all")


def test_an_empty_history_makes_an_empty_plot(tmp_path: Path) -> None:
    training_curves([], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 0
