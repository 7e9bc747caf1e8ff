"""A plain install imports, trains, learns skills and generates; a program that needs an extra names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.errors import EXIT_USER_ERROR
from tests.support.tiny_folder import write_tiny_folder

SCRIPT = Path(__file__).parent / "support" / "ordinary_install.py"
SHORT = [
    *("--max_steps", "2", "--max_seq_length", "64", "--train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--lora_r", "4"),
]


def run_plain(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process where no optional package can be found."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def succeed(*arguments: str | Path) -> str:
    done = run_plain(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str | Path) -> str:
    """Return the one-line error of a program that needs an extra."""
    done = run_plain(*arguments)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    lines = [json.dumps({"prompt": f"say {n}\n", "response": f"print({n})"}) for n in range(120)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_every_module_can_be_imported() -> None:
    succeed("--modules")


def test_a_plain_install_trains_and_generates(base: Path, rows: Path, tmp_path: Path) -> None:
    succeed("train", "--model_name", base, "--datasets", f"mine={rows}", *SHORT, "--output_dir", tmp_path)
    mixture = tmp_path / "best_model"
    succeed("generate", "--trained_model", mixture, "--prompt", "say 1", "--max_new_tokens", "4")
    assert "expert_0" in succeed("experts", mixture)


def test_a_plain_install_learns_a_skill(base: Path, rows: Path, tmp_path: Path) -> None:
    succeed("acquire", "--model_name", base, "--skill", f"mine={rows}", *SHORT, "--output_dir", tmp_path)
    assert "mine" in succeed("datasets", "--datasets", f"mine={rows}")


def test_a_missing_extra_is_named(base: Path, rows: Path, tmp_path: Path) -> None:
    train = ("train", "--model_name", base, "--datasets", f"mine={rows}", *SHORT, "--output_dir", tmp_path)
    for flags, extra in (
        (["--load_in_4bit"], "quantization"),
        (["--teach_router", "clusters:2"], "clusters"),
        (["--report_to", "tensorboard"], "tensorboard"),
        (["--report_to", "wandb"], "wandb"),
        (["--wandb_project", "mine"], "wandb"),
    ):
        assert f"pip install 'dylora-moe[{extra}]'" in refused(*train, *flags)
    benchmark = ("benchmark", "--base_model", base, "--output", tmp_path / "scores.json", "--benchmarks")
    for flags in (["humanevalplus"], ["humaneval", "--no_evalplus"]):
        assert "pip install 'dylora-moe[evaluation]'" in refused(*benchmark, *flags)
