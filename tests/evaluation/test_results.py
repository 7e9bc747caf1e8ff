"""Results on disk, and the comparison of two."""

import json
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.results import (
    BenchmarkResult,
    ModelRecord,
    Settings,
    VerdictRecord,
    compare_results,
    read_result,
    summarize,
    write_result,
)


def result(passed: dict[str, list[bool]], **changes: Any) -> BenchmarkResult:
    verdicts = {
        task: [VerdictRecord(passed=one, status="passed" if one else "wrong") for one in found]
        for task, found in passed.items()
    }
    settings = Settings(
        prompt_style="complete",
        max_new_tokens=1,
        temperature=0,
        num_beams=1,
        n_samples=1,
        seed=0,
        max_samples=None,
        evalplus=changes.pop("evalplus", True),
    )
    values: dict[str, Any] = {
        "model": ModelRecord(name="a", kind="base", digest="0", dtype="float32"),
        "settings": settings,
        "prompts_hash": "p",
        "batch_size": 1,
        "sandbox": "none",
        "started": "2024-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "generation_seconds": 1.0,
        "generated_tokens": 1,
        "tokens": 1,
        "samples": 1,
        "cut_off": 0,
        "versions": {},
        "benchmarks": {changes.pop("benchmark", "humaneval"): summarize(changes.pop("problems", "h"), verdicts)},
    }
    return BenchmarkResult(**{**values, **changes})


def test_a_difference_names_the_tasks_that_changed() -> None:
    before = result({"a": [True], "b": [False], "c": [False], "d": [True]})
    after = result({"a": [False], "b": [True], "c": [True], "d": [True]})
    found = compare_results(before, after)["humaneval"]
    assert (found.before.value, found.after.value, found.difference) == (0.5, 0.75, 0.25)
    assert (found.gained, found.lost, found.tasks) == (["b", "c"], ["a"], 4)
    assert found.interval[0] < 0 < found.interval[1]
    back = compare_results(after, before)["humaneval"]
    assert (back.difference, back.gained, back.lost) == (-0.25, ["a"], ["b", "c"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "mbpp"}, "a benchmark that both results have: the first has humaneval, the second mbpp"),
        ({"prompts_hash": "q"}, "the same prompts"),
        ({"problems": "i"}, "the same problems, and those of humaneval differ"),
        ({"evalplus": False}, "the same tests"),
    ],
)
def test_results_on_different_prompts_problems_or_tests_are_not_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_results(result({"a": [True]}), result({"a": [True]}, **changes))


def test_a_result_comes_back_whole(tmp_path: Path) -> None:
    written = result({"a": [True, False], "b": [False, False]})
    write_result(tmp_path / "new" / "one.json", written)
    assert read_result(tmp_path / "new" / "one.json") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    write_result(path, result({"a": [True]}))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dylo_moe.durable.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_result(path, result({"a": [False]}))
    assert read_result(path) == result({"a": [True]})
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "is not a result of this program: model"), ("", "is not a result")]
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_result(tmp_path / "one.json")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_result(tmp_path / "none.json")


def test_a_setting_that_is_missing_is_not_replaced_by_a_default(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    write_result(path, result({"a": [True]}))
    path.write_text(path.read_text().replace('"seed": 0,', ""))
    with pytest.raises(ConfigError, match=r"is not a result of this program: settings: .*missing: seed"):
        read_result(path)


def test_the_settings_of_a_file_have_the_names_that_they_always_had(tmp_path: Path) -> None:
    write_result(tmp_path / "one.json", result({"a": [True]}))
    assert set(json.loads((tmp_path / "one.json").read_text())["settings"]) == {
        *("prompt_style", "max_new_tokens", "temperature", "num_beams", "n_samples", "seed", "max_samples", "evalplus")
    }


def test_scores_have_errors_and_intervals() -> None:
    record = summarize("h", {task: [VerdictRecord(passed=task in "ab", status="x")] for task in "abcd"})
    estimate = record.pass_at[1]
    assert set(record.pass_at) == {1} and estimate.value == 0.5
    assert estimate.standard_error == pytest.approx((1 / 3) ** 0.5 / 2)
    assert estimate.interval == pytest.approx((0.15, 0.85), abs=0.005)
