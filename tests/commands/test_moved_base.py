"""Every program that loads a mixture finds a moved base model with ``--base_model``."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.commands.benchmark import _args_per_model
from dylo_moe.config.evaluation import BenchmarkArgs
from dylo_moe.config.parser import parse
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.runs.benchmark_setup import load_model
from dylo_moe.runs.mixtures import load_mixture
from tests.support.families import stir
from tests.support.tiny_folder import write_tiny_folder

SHORT = [
    *("--max_seq_length", "64", "--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--lora_r", "4"),
    *("--learning_rate", "5e-3", "--report_to", "none"),
]


def rows(file: Path) -> Path:
    lines = [json.dumps({"instruction": f"Say {n}.", "output": f"print({n})"}) for n in range(80)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with ``mixture``, ``sql`` (an adapter), ``data.jsonl``, and the base moved to ``away``."""
    monkeypatch.chdir(tmp_path)
    base = write_tiny_folder(tmp_path / "base")
    torch.manual_seed(1)
    model = DyLoRA_MoE(str(base), 2, rank=2)
    stir(model)
    model.save_pretrained(tmp_path / "mixture")
    model.experts.export("expert_0", tmp_path / "sql")
    rows(tmp_path / "data.jsonl")
    base.rename(tmp_path / "away")
    return tmp_path


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--trained_model", "mixture", "--prompt", "def f", "--max_new_tokens", "2"],
        ["experts", "mixture", "--import", "sql"],
        ["experts", "mixture", "--rename", "expert_0=queries"],
    ],
    ids=["generate", "import", "rename"],
)
def test_a_moved_base_needs_the_base_model_flag(
    moved: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == EXIT_USER_ERROR
    line = only_error(capsys)
    assert f"was in {moved / 'base'}, which is not there any more" in line and "--base_model" in line
    assert main([*words, "--base_model", "./gone"]) == EXIT_USER_ERROR
    assert "there is no folder './gone'; check --base_model" in only_error(capsys)
    assert main([*words, "--base_model", "away"]) == 0


def test_experts_are_shown_and_exported_without_the_base(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "mixture"]) == 0
    assert main(["experts", "mixture", "--export", "expert_1", "out"]) == 0
    assert "Exported expert_1" in capsys.readouterr().out


def benchmark_model(*words: str) -> tuple[str, str]:
    """Return the class and the name of the model that ``benchmark`` scores."""
    args = parse(BenchmarkArgs, "benchmark", "", list(words))
    model, _, name = load_model(args)
    return type(model).__name__, name


def test_benchmark_scores_a_mixture_on_the_given_base(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = ("--trained_model", "mixture")
    assert benchmark_model(*mixture, "--base_model", "away") == ("DyLoRA_MoE", "mixture")
    assert benchmark_model("--base_model", "away") == ("LlamaForCausalLM", "away")
    common = ["benchmark", "--no_evalplus", "--max_samples", "1", "--unsafe_no_sandbox", *mixture]
    for words in (common, [*common, "--base_model"]):
        assert main(words) == EXIT_USER_ERROR
        line = only_error(capsys)
        assert "which is not there any more" in line and "--base_model" in line
    assert main([*common, "--base_model", "away", "--revision", "v1"]) == EXIT_USER_ERROR
    assert "--revision must be left out where a mixture is scored, got v1" in only_error(capsys)
    (moved / "away").rename(moved / "base")
    assert benchmark_model(*mixture, "--base_model") == ("LlamaForCausalLM", str(moved / "base"))


def test_a_comparison_finds_the_base_of_its_mixture(moved: Path) -> None:
    args = parse(BenchmarkArgs, "benchmark", "", ["--compare", "away", "mixture", "--base_model", "away"])
    plain, mixture = (load_model(one) for one in _args_per_model(args))
    assert (type(plain[0]).__name__, type(mixture[0]).__name__) == ("LlamaForCausalLM", "DyLoRA_MoE")


def train(*words: str) -> int:
    flags = ["--datasets", "mine=data.jsonl", "--num_experts", "2", *SHORT, "--output_dir", "run"]
    return main(["train", *flags, *words])


def test_training_resumes_with_a_moved_base(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("away", "base")
    assert train("--base_model", "base", "--max_steps", "2", "--save_steps", "2") == 0
    shutil.move("base", "away")
    shutil.move("run/best_model", "best")
    assert train("--base_model", "./base", "--max_steps", "4", "--resume_from_checkpoint") == EXIT_USER_ERROR
    assert "there is no folder './base'; check --base_model" in only_error(capsys)
    assert train("--base_model", "away", "--max_steps", "4", "--resume_from_checkpoint") == 0
    assert json.loads(Path("run/report.json").read_text())["steps"] == 4
    saved = json.loads(Path("run/best_model/dylo_moe.json").read_text())["base_model"]
    assert (saved["name"], saved["from_here"]) == (str(moved / "away"), "../../away")


def acquire(*words: str) -> int:
    return main(["acquire", *SHORT, "--max_steps", "2", "--sample_rows", "8", "--output_dir", "run", *words])


def test_acquire_resumes_with_a_moved_base(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("away", "base")
    assert acquire("--base_model", "base", "--skill", "one=data.jsonl") == 0
    shutil.move("base", "away")
    shutil.copy("data.jsonl", "more.jsonl")
    two = ("--skill", "one=data.jsonl", "two=more.jsonl", "--extend", "never")
    assert acquire("--base_model", "./base", *two) == EXIT_USER_ERROR
    assert "there is no folder './base'; check --base_model" in only_error(capsys)
    write_tiny_folder(Path("other"), seed=5)
    before = Path("run/model/dylo_moe.json").read_bytes()
    assert acquire("--base_model", "other", *two) == EXIT_USER_ERROR
    assert "is another one" in only_error(capsys) and Path("run/model/dylo_moe.json").read_bytes() == before
    assert acquire("--base_model", "away", *two) == 0
    saved = json.loads(Path("run/model/dylo_moe.json").read_text())
    assert saved["base_model"]["name"] == str(moved / "away") and len(saved["experts"]) == 2


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_mixture_comes_first(moved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("away")
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained("mixture")
    assert "<mine>" in load_mixture("mixture", "away")[1].get_vocab()
    for file in Path("mixture").glob("tokenizer*"):
        os.remove(file)
    assert "<mine>" not in load_mixture("mixture", "away")[1].get_vocab()


def test_the_base_needs_no_tokenizer_if_the_mixture_has_one(moved: Path) -> None:
    load_base_model("away").save_pretrained("weights")
    model, tokenizer = load_mixture("mixture", "weights")
    assert model.base_name == str(moved / "weights") and tokenizer.eos_token == "<eos>"


LOADERS: list[Callable[[], object]] = [lambda: load_mixture("./gone"), lambda: load_mixture("gone/a/b", "away")]


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_mixture_is_a_one_line_error(moved: Path, load: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^(\./)?gone(/a/b)? is not a checkpoint of this program"):
        load()
