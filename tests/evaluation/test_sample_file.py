"""The file of samples has whole lines only, and samples of one run only."""

import json
from pathlib import Path

import pytest

from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.generation import Sample
from dylo_moe.evaluation.sample_file import SampleFile

IDENTITY = {"model_digest": "abc", "temperature": 0.0}


def sample(task: str, index: int = 0) -> Sample:
    return Sample(task_id=task, index=index, completion="    return 'é\n'", tokens=5, ended=True)


def test_samples_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "one.jsonl"
    SampleFile(path, IDENTITY).append([sample("a"), sample("a", 1)])
    SampleFile(path, IDENTITY).append([sample("b")])
    found = SampleFile(path, IDENTITY).samples
    assert found == {("a", 0): sample("a"), ("a", 1): sample("a", 1), ("b", 0): sample("b")}


def test_a_truncated_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    SampleFile(path, IDENTITY).append([sample("a"), sample("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    file = SampleFile(path, IDENTITY)
    assert list(file.samples) == [("a", 0)]
    file.append([sample("b")])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("other", [{"model_digest": "abd", "temperature": 0.0}, {**IDENTITY, "temperature": 0.8}])
def test_samples_of_another_run_are_refused_and_left_alone(tmp_path: Path, other: dict[str, object]) -> None:
    path = tmp_path / "one.jsonl"
    SampleFile(path, IDENTITY).append([sample("a")])
    before = path.read_bytes()
    (key,) = [key for key in other if other[key] != IDENTITY[key]]
    with pytest.raises(ConfigError, match=rf"holds samples of another run: its {key} is .*choose another `output`"):
        SampleFile(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["my notes", "my\nnotes\n", "[1]\n"])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not a file of samples"):
        SampleFile(path, IDENTITY)
    assert path.read_text() == text


def test_a_line_that_is_not_a_sample_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(IDENTITY) + "\n{}\n")
    with pytest.raises(ConfigError, match="line 2 is not a sample"):
        SampleFile(path, IDENTITY)
