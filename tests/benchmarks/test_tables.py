"""The tables and verdicts that the benchmarks compute from their measurements; nothing is measured here."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.timing import Timed, interleaved, ratios
from benchmarks.forgetting import report as forgetting_report
from benchmarks.quality import __main__ as quality

ROOT = Path(__file__).parents[2]


def test_times_are_compared_within_a_round() -> None:
    # the machine halves its speed in the second round
    seconds = {"reference": [1.0, 2.0, 1.0], "twice": [2.0, 4.0, 2.0], "seldom": [3.0]}
    found = ratios(seconds, "reference")
    assert found["twice"] == {"median": 2.0, "quartiles": [2.0, 2.0], "rounds": 3}
    assert found["seldom"]["median"] == 3.0 and found["seldom"]["rounds"] == 1


def test_each_entry_warms_up_once_and_runs_once_per_round() -> None:
    calls: list[str] = []
    entries = {
        "often": Timed(lambda: calls.append("often"), 3),
        "once": Timed(lambda: calls.append("once"), 1, warm_up=lambda: calls.append("warm-up")),
    }
    seconds = interleaved(entries, progress=lambda text: None)
    assert {name: len(values) for name, values in seconds.items()} == {"often": 3, "once": 1}
    assert sorted(calls) == ["often"] * 4 + ["once", "warm-up"]


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({"prefix": [1.0, 1.2], "per_layer": [1.1, 1.3], "final": [2.0, 2.0]}, "which exceeds"),
        ({"prefix": [1.0, 1.2], "per_layer": [1.3, 1.0], "final": [2.0, 2.0]}, "which does not exceed"),
    ],
)
def test_a_lead_counts_if_it_exceeds_its_spread(losses: dict[str, list[float]], wanted: str) -> None:
    runs = [
        {
            "arms": {
                name: {"losses": {"dense": {"one": 9.0}, "sparse": {"one": values[seed]}}}
                for name, values in losses.items()
            }
        }
        for seed in range(2)
    ]
    assert quality.verdict(runs).startswith("Best routing mode by mean sparse loss: `prefix`")
    assert wanted in quality.verdict(runs)


def test_the_tables_of_a_stream_match_hand_worked_values() -> None:
    ours = {
        "base": [2.0, 2.0],
        "losses": [[1.0], [1.01, 1.0]],
        "oracle": [1.0, 1.0],
        "gates": {"closed form": {"tokens": 0.9, "examples": 1.0, "losses": [1.01, 1.0]}},
        "auroc": {"cosine": [[None, 0.94], [1.0, None]], "entropy": [1.0, 0.98]},
    }
    sequential = {"losses": [[1.0], [1.5, 1.0]]}
    settings = {
        **{"skills": {"a": [9, 3], "b": [9, 3]}, "steps": 1, "batch_size": 8, "max_length": 9, "rank": 2},
        **{"held_out": 3, "learning_rate": 1e-3, "replayed": 0.01},
    }
    result = {
        "environment": {"versions": {"torch": "0"}},
        "settings": settings,
        "runs": {
            "ours 0": ours,
            "sequential 0": sequential,
            "replay 0": sequential,
            "joint 0": {"losses": [[1.0, 1.2]]},
        },
    }
    found = forgetting_report.tables(result)
    assert "| ours, one expert a skill | 1.0050 | +0.50% | +1.00% | +1.00% (a) | -0.0100 |" in found["arms"]
    assert "| one LoRA, in sequence | 1.2500 | +25.00% | +50.00% | +50.00% (a) | -0.5000 |" in found["arms"]
    assert "| one LoRA, all skills mixed (joint) | 1.1000 | +10.00% |  |  |  |" in found["arms"]
    assert "| closed form | 90.0% | 100.0% | 1.0050 | +0.50% |" in found["gates"]
    assert "| cosine | 0.970 | 0.940 | b after a 0.940 |" in found["novelty"]
    assert "| entropy | 0.990 | 0.980 | none |" in found["novelty"]


@pytest.mark.parametrize(
    "script", ["speed", "quality", "speed.profile", "humaneval", "forgetting", "forgetting.skill_cost"]
)
def test_a_missing_result_is_a_one_line_error(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--show", "--output", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("measure first, or name another with --output")
    assert "Traceback" not in done.stderr
