"""``train.py`` under torchrun: two processes print, report, save and fail once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.training.artifacts.store import FolderStore
from dylo_moe.training.checkpointing import checkpoints
from tests.support import full_disk
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
SHORT = ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--lora_r", "4", "--max_seq_length", "64"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"print({n})"} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mine={path}"


def torchrun(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
        timeout=1200,
    )


def test_two_processes_print_and_write_once(base: Path, data: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ["--model_name", str(base), "--datasets", data, *SHORT, "--num_epochs", "1"]
    done = torchrun(*common, "--output_dir", str(output), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    for once in ("Packed into", "Evaluating the base model", "Evaluating the trained mixture", "Generate with it"):
        assert done.stdout.count(once) == 1
    assert sum("Tokenizing mine train" in line and "  0%" in line for line in done.stderr.splitlines()) == 1
    report = json.loads((output / "report.json").read_text())
    assert report["mixture"]["loss/mine"] < report["base"]["loss/mine"]
    assert DyLoRA_MoE.from_pretrained(output / "best_model").router.maturity == [1, 1, 1, 1]
    assert main(["train", *common[:-1], "2", "--output_dir", str(output), "--resume_from_checkpoint"]) == 0
    # one process takes twice the steps of two per epoch, and continues their count
    assert json.loads((output / "report.json").read_text())["steps"] > report["steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_r", "-1"], "--lora_r must be at least 1, got -1"),
        (["--datasets", "mine=gone.jsonl"], "there is no file or folder gone.jsonl"),
        (["--routing", "prefix:9"], "prefix:K needs K from 0 to 3"),
        (["--wandb_checkpoint_artifact", "nonsense"], "must be like user/project/artifact:v0"),
    ],
)
def test_an_error_ends_all_processes_and_is_printed_once(
    base: Path, data: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = ["--model_name", str(base), "--datasets", data, *SHORT, "--output_dir", str(tmp_path / "out")]
    done = torchrun(*given, *arguments)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "dylo_moe/" not in done.stderr, "a traceback of this package"


def test_a_full_disk_ends_all_processes(base: Path, data: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--model_name", str(base), "--datasets", data, *SHORT, "--output_dir", str(output), "--max_steps", "1"]
    done = torchrun(*given, **full_disk.environment("report.json", tmp_path / "python"))
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: No space left on device: while writing; free space, or write elsewhere"
    ]


def test_a_run_resumes_from_an_artifact(base: Path, data: str, tmp_path: Path) -> None:
    common = ["train", "--model_name", str(base), "--datasets", data, *SHORT]
    assert main([*common, "--num_epochs", "1", "--output_dir", str(tmp_path / "first")]) == 0
    steps = json.loads((tmp_path / "first" / "report.json").read_text())["steps"]
    whole = tmp_path / "whole" / f"checkpoint-{steps}"
    partial = checkpoints.begin_write(whole)
    for path in (tmp_path / "first" / whole.name).rglob("*"):
        if path.is_file() and path.name != checkpoints.MANIFEST:
            target = partial / path.relative_to(tmp_path / "first" / whole.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    checkpoints.commit(whole)
    reference = FolderStore(tmp_path / "store").put(whole, "mine", {"step": steps})
    output = tmp_path / "second"
    flags = ["--num_epochs", "2", "--output_dir", str(output), "--wandb_checkpoint_artifact", reference]
    assert main([*common, *flags]) == 0
    assert json.loads((output / "report.json").read_text())["steps"] == 2 * steps
