"""A run that is asked to stop saves, reports it by its exit code, and resumes with the same result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState, TrainingArguments

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_STOPPED, EXIT_USER_ERROR
from dylo_moe.training.checkpointing import checkpoints
from dylo_moe.training.checkpointing.interruption import (
    EvaluationInterrupted,
    InterruptionCallback,
    StopRequest,
)
from tests.support.killed_run import STEPS, arguments, same, write_data
from tests.support.tiny_folder import write_tiny_folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, data, and a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_folder(folder / "base")
    write_data(folder)
    assert main(["train", *flags(folder, "undisturbed")]) == 0
    return folder


def flags(folder: Path, name: str) -> list[str]:
    return arguments(folder / "base", folder / name, folder)


class StopsIn(InterruptionCallback):
    """Callback that sends this process a signal at a step, or at the first batch of an evaluation after it."""

    step, batch = 5, 0

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def,override]
        if state.global_step == self.step and not self.batch:
            signal.raise_signal(signal.SIGTERM)
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def,override]
        if state.global_step >= self.step and self.batch:
            signal.raise_signal(signal.SIGINT)
        super().on_prediction_step(args, state, control, **kwargs)


@pytest.mark.parametrize(("step", "batch"), [(5, 0), (3, 1), (STEPS, 1)], ids=["step", "evaluation", "last"])
def test_a_signal_saves_and_the_resumed_run_is_bit_equal(
    undisturbed: Path,
    tmp_path: Path,
    step: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = flags(undisturbed, str(tmp_path / "stopped"))
    ended: list[bool] = []
    monkeypatch.setattr(StopsIn, "step", step)
    monkeypatch.setattr(StopsIn, "batch", batch)
    with monkeypatch.context() as patch:
        patch.setattr("dylo_moe.runs.training_loop.InterruptionCallback", StopsIn)
        patch.setattr(Accelerator, "end_training", lambda accelerator: ended.append(True))
        assert main(["train", *wanted]) == EXIT_STOPPED
    assert ended == [True], "an open process group can abort the process at its exit"
    said = capsys.readouterr()
    assert "saving after this step" in said.err and "Resume with --resume_from_checkpoint" in said.out
    assert not (tmp_path / "stopped" / "best_model").exists()
    whole, skipped = checkpoints.newest_whole(tmp_path / "stopped")
    assert whole is not None and not skipped
    assert int(whole.name.partition("-")[2]) >= step
    assert main(["train", *wanted]) == 0
    assert f"Resuming from {whole}" in capsys.readouterr().out.replace("\n", "")
    report = json.loads((tmp_path / "stopped" / "report.json").read_text())
    assert report["steps"] == STEPS, "a run that has taken all its steps takes no more"
    same(undisturbed / "undisturbed", tmp_path / "stopped")


def test_signal_handlers_are_restored_and_a_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    with request.listening():
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    code = (
        "import signal, time\n"
        "from dylo_moe.training.checkpointing.interruption import StopRequest\n"
        "with StopRequest().listening():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -signal.SIGTERM


def test_a_real_process_ends_with_the_code_for_a_restart(undisturbed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dylo_moe",
        "train",
        *flags(undisturbed, str(tmp_path / "run")),
        "--max_steps",
        "5000",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not checkpoints.newest_first(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert "SIGTERM: saving after this step" in said and "Traceback" not in said
    assert checkpoints.newest_whole(tmp_path / "run")[0] is not None


def callback(request: StopRequest, minutes: float | None = None) -> tuple[InterruptionCallback, list[float]]:
    now = [0.0]
    made = InterruptionCallback(request, Accelerator(), minutes, clock=lambda: now[0])
    return made, now


def test_checkpoints_are_saved_at_intervals_of_time() -> None:
    args, state = TrainingArguments(use_cpu=True), TrainerState()  # before the Accelerator, whose state it resets
    made, now = callback(StopRequest(), minutes=2)
    saved = []
    made.on_train_begin(args, state, TrainerControl())
    for second in range(0, 400, 50):
        now[0] = float(second)
        control = TrainerControl()
        made.on_step_end(args, state, control)
        assert not control.should_training_stop
        if control.should_save:
            saved.append(second)
            made.on_save(args, state, control)
    assert saved == [150, 300]


def test_a_request_ends_steps_and_evaluations() -> None:
    args, state, control = TrainingArguments(use_cpu=True), TrainerState(), TrainerControl()
    request = StopRequest()
    made, _ = callback(request)
    made.on_step_end(args, state, control)
    made.on_prediction_step(args, state, control)
    assert not control.should_save and not control.should_training_stop
    request.signal = signal.SIGTERM
    control.should_evaluate = True
    made.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate
    with pytest.raises(EvaluationInterrupted):
        made.on_prediction_step(args, state, control)


def test_a_new_run_is_refused_in_the_folder_of_an_old_one(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [flag for flag in flags(undisturbed, "undisturbed") if flag not in ("--resume_from_checkpoint", "auto")]
    assert main(["train", *wanted]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "holds checkpoints of an earlier run" in said and "--overwrite_output_dir" in said
    assert checkpoints.newest_whole(undisturbed / "undisturbed")[0] is not None


def test_resuming_with_other_data_is_refused(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags(undisturbed, "undisturbed"), "--seed", "7"]) == EXIT_USER_ERROR
    assert "was trained on other data, or in another order" in capsys.readouterr().err


def test_missing_data_is_reported_before_anything_is_changed(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [flag.replace("one.jsonl", "gone.jsonl") for flag in flags(undisturbed, "undisturbed")]
    before = sorted(path for path in (undisturbed / "undisturbed").rglob("*"))
    assert main(["train", *wanted]) == EXIT_USER_ERROR
    assert "there is no file or folder" in capsys.readouterr().err
    assert sorted(path for path in (undisturbed / "undisturbed").rglob("*")) == before


def test_resuming_with_another_optimizer_is_refused(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags(undisturbed, "undisturbed"), "--router_learning_rate", "1e-3"]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "the optimizer of the checkpoint" in said and "--router_learning_rate of the run that wrote it" in said


def test_a_missing_best_checkpoint_is_reported_and_not_replaced_by_another(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoints.newest_first(undisturbed / "undisturbed")[0]
    copied = checkpoints.folder_of(tmp_path / "copy", STEPS)
    partial = checkpoints.begin_write(copied)
    shutil.copytree(newest, partial, dirs_exist_ok=True)
    (partial / checkpoints.MANIFEST).unlink()
    state = json.loads((partial / "trainer_state.json").read_text())
    state.update(best_global_step=7, best_metric=0.1, best_model_checkpoint="elsewhere/checkpoint-7")
    (partial / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.commit(copied)
    assert main(["train", *flags(undisturbed, str(tmp_path / "copy")), "--max_steps", str(STEPS + 2)]) == 0
    assert f"{tmp_path / 'copy' / 'checkpoint-7'}, the best so far, is gone" in caplog.text
    newest = checkpoints.newest_first(tmp_path / "copy")[0]
    assert json.loads((newest / "trainer_state.json").read_text())["best_global_step"] == STEPS + 2
