"""``train`` logs to trackers, and ends with an error if a loss is not finite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.cli import main
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.training.monitoring import trackers
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
SHORT = ["--datasets", "python_stdlib,cpp_headers", "--training_subset", "1", "--eval_subset", "4"]
SHORT += ["--max_seq_length", "96", "--train_batch_size", "8", "--gradient_accumulation_steps", "2", "--lora_r", "4"]
SHORT += ["--logging_steps", "1", "--no_decontaminate"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def newest_history(output: Path) -> list[dict[str, float]]:
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    history: list[dict[str, float]] = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return history


def test_the_log_is_in_the_checkpoints_and_in_tensorboard(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)  # the default folder of a writer
    arguments = ["--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--model_name", str(base), *SHORT, *arguments]) == 0
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent)).Reload().Tags()["scalars"]
    logged = {name for entry in newest_history(tmp_path / "out") if "learning_rate" in entry for name in entry} - {
        "step"
    }
    assert {f"train/{name}" for name in logged} <= set(written)
    assert {f"expert_usage/{domain}/expert_3" for domain in ("python_stdlib", "cpp_headers")} <= logged
    assert {"grad_norm/expert_0", "grad_norm/router", "router/dead_experts", "memory_mib"} <= logged


def test_without_a_tracker_no_tracker_files_are_written(base: Path, tmp_path: Path) -> None:
    arguments = ["--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path)]
    assert main(["train", "--model_name", str(base), *SHORT, *arguments]) == 0
    assert not (tmp_path / "runs").exists()
    assert "grad_norm/router" in newest_history(tmp_path)[0]


def test_a_missing_tracker_is_a_one_line_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.INSTALLED, "mlflow", lambda: False)
    arguments = ["train", "--model_name", str(base), *SHORT, "--output_dir", str(tmp_path / "out"), "--report_to"]
    assert main([*arguments, "mlflow"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.strip() == "error: --report_to mlflow: not installed; run: pip install mlflow"
    for wrong in ("wandbb", "none,wandb", ""):
        assert main([*arguments, wrong]) == EXIT_USER_ERROR
        wanted = f"--report_to must be auto, none or some of tensorboard, wandb, mlflow, trackio, got {wrong!r}"
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_ends_with_one_line_and_an_exit_code(base: Path, tmp_path: Path) -> None:
    arguments = ["--learning_rate", "1e38", "--warmup_ratio", "0", "--num_epochs", "4", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--model_name", str(base), *SHORT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == EXIT_USER_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is not" in line or "is nan" in line or "finite" in line
    assert "--learning_rate (now 1e+38)" in line and "Traceback" not in done.stderr
    for checkpoint in tmp_path.glob("checkpoint-*"):
        DyLoRA_MoE.from_pretrained(checkpoint)
    assert not (tmp_path / "best_model").exists()
