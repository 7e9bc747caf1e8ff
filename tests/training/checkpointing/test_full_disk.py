"""A disk that fills up or goes away during a run causes one line of error, and no saved checkpoint is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.training.checkpointing import checkpoints
from tests.support.killed_run import arguments, same, write_data
from tests.support.tiny_folder import write_tiny_folder

# After the checkpoint of the given step, no file may grow beyond the limit: the effect of a full disk.
FILLS_UP = """
import resource, signal, sys
from dylo_moe.cli import main
from dylo_moe.runs import training_loop
from dylo_moe.training.checkpointing.interruption import InterruptionCallback

step, limit, *flags = sys.argv[1:]

class FillsUp(InterruptionCallback):
    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        if state.global_step >= int(step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
training_loop.InterruptionCallback = FillsUp
sys.exit(main(["train", *flags]))
"""


def run_on_a_disk_that_fills_up(flags: list[str], step: int, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FILLS_UP, str(step), str(limit), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, data, and a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    assert main(["train", *arguments(write_tiny_folder(folder / "base"), folder / "undisturbed", folder)]) == 0
    return folder


@pytest.mark.parametrize("limit", [0, 3000, 20_000], ids=["nothing fits", "some files fit", "the optimizer does not"])
def test_a_full_disk_costs_only_the_checkpoint_being_written(undisturbed: Path, tmp_path: Path, limit: int) -> None:
    flags = arguments(undisturbed / "base", tmp_path / "full", undisturbed)
    done = run_on_a_disk_that_fills_up(flags, step=4, limit=limit)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: cannot write") and "checkpoint-5, with" in line and "earlier checkpoints" in line
    whole, skipped = checkpoints.newest_whole(tmp_path / "full")
    assert whole == tmp_path / "full" / "checkpoint-4" and not skipped
    assert not list((tmp_path / "full").glob(".*"))
    assert main(["train", *flags]) == 0
    same(undisturbed / "undisturbed", tmp_path / "full")


def test_an_output_folder_that_disappears_is_one_line(undisturbed: Path, tmp_path: Path) -> None:
    """Root may write to read-only folders, so a file replaces the folder instead."""
    code = FILLS_UP.replace(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))",
        "import os; os.rename(args.output_dir, args.output_dir + '.kept'); open(args.output_dir, 'w').close()",
    )
    flags = arguments(undisturbed / "base", tmp_path / "run", undisturbed)
    done = subprocess.run([sys.executable, "-c", code, "4", "0", *flags], capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert checkpoints.newest_whole(tmp_path / "run.kept")[0] == tmp_path / "run.kept" / "checkpoint-4"
