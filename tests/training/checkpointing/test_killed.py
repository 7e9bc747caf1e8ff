"""A run that is killed anywhere can be resumed, and ends with the bits of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.training.checkpointing import checkpoints
from tests.support import flat_bucket
from tests.support.killed_run import arguments, write_data
from tests.support.tiny_folder import write_tiny_folder

KILLS = os.environ.get("DYLO_MOE_KILLS", "6")
ROOT = Path(__file__).parents[3]
TORN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from tests.support.killed_run import train

operations, bucket, *flags = sys.argv[1:]
train(flags, int(operations), Path(bucket), SimpleNamespace())
"""


@pytest.mark.parametrize("place", [[], ["bucket"]], ids=["disk", "bucket"])
def test_a_killed_run_ends_with_the_same_bits(place: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_run", KILLS, *place],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"bit-equal after {KILLS} kills" in done.stdout


def test_a_run_killed_during_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    output = tmp_path / "run"
    flags = [*arguments(write_tiny_folder(tmp_path / "base"), output, tmp_path), "--save_in_place", "--max_steps", "3"]
    done = subprocess.run(
        [sys.executable, "-c", TORN, "8", str(output), *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL
    (torn,) = checkpoints.unfinished(output)
    assert any(torn.rglob("*")) and checkpoints.newest_first(output) == []
    flat_bucket.install(output, monkeypatch.setattr)
    assert main(["train", *flags]) == 0
    said = capsys.readouterr().out
    assert f"Skipping {torn}: it was not finished" in said and "Resuming from" not in said
    assert (output / "best_model" / "dylo_moe.json").is_file() and not list(output.glob(".unfinished-*"))
    whole, skipped = checkpoints.newest_whole(output)
    assert whole is not None and whole.name == "checkpoint-3" and not skipped


def test_a_bucket_without_save_in_place_is_one_line_of_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    flat_bucket.install(tmp_path / "run", monkeypatch.setattr)
    flags = arguments(write_tiny_folder(tmp_path / "base"), tmp_path / "run", tmp_path)
    assert main(["train", *flags]) == EXIT_USER_ERROR
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "folders cannot be renamed there" in errors[0] and "give --save_in_place" in errors[0]
    assert checkpoints.newest_first(tmp_path / "run") == []
