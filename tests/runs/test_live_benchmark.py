"""Benchmarks during training score the current weights, log the scores, and do not change the training."""

import json
from pathlib import Path
from typing import Any

import pytest

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR, EvaluationError
from dylo_moe.evaluation.model_digest import model_digest
from dylo_moe.evaluation.results import read_result
from dylo_moe.runs import live_benchmark
from tests.support.tiny_folder import write_tiny_folder

pytest.importorskip("evalplus")

TASKS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def f{number}(n):\n",
        "entry_point": f"f{number}",
        "canonical_solution": "    return n + 1\n",
        "test": "",
        "contract": "",
        "base_input": [[1], [2]],
        "plus_input": [[3]],
        "atol": 0,
    }
    for number in range(164)
]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of a short run of two epochs that benchmarks one task; an output folder must follow."""
    data = tmp_path / "HumanEvalPlus.jsonl"
    data.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    # EvalPlus reads the variable on import, which another test may have caused already
    monkeypatch.setattr("evalplus.data.humaneval.HUMANEVAL_OVERRIDE_PATH", str(data))
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"print({n})"}) + "\n" for n in range(80)))
    base = write_tiny_folder(tmp_path / "base")
    short = "--max_seq_length 32 --lora_r 2 --num_epochs 2 --gradient_accumulation_steps 1 --train_batch_size 4"
    benchmark = "--benchmark_samples 1 --benchmark_max_new_tokens 8"
    run = ["train", "--model_name", str(base), "--datasets", f"mine={mine}"]
    return [*run, *short.split(), *benchmark.split(), "--output_dir"]


def scores(output: Path) -> list[dict[str, Any]]:
    """Return the log entries with benchmark scores, from the newest checkpoint."""
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_benchmark_humaneval_pass_at_1" in entry]


def test_each_epoch_scores_the_current_weights(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[str] = []
    original = live_benchmark.LiveBenchmark.score

    def score(self: live_benchmark.LiveBenchmark) -> Any:
        assert self._trainer is not None
        digests.append(model_digest(self._trainer.model))
        result = original(self)
        assert result is not None and result.model.digest == digests[-1] and result.model.kind == "mixture"
        return result

    monkeypatch.setattr(live_benchmark.LiveBenchmark, "score", score)
    assert main([*arguments, str(tmp_path / "on"), "--benchmark_strategy", "epoch"]) == 0
    assert len(digests) == len(set(digests)) == 2, "the weights did not change between the epochs"
    logged = scores(tmp_path / "on")
    assert [entry["epoch"] for entry in logged] == [1.0, 2.0]
    assert all(0 <= entry["eval_benchmark_humaneval_pass_at_1"] <= 1 for entry in logged)
    # training without a benchmark gives the same weights
    assert main([*arguments, str(tmp_path / "off")]) == 0
    on, off = (model_digest(DyLoRA_MoE.from_pretrained(tmp_path / name / "best_model")) for name in ("on", "off"))
    assert on == off
    assert not scores(tmp_path / "off")


def test_the_final_score_is_that_of_the_saved_mixture(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main([*arguments, str(output), "--benchmark_strategy", "final", "--benchmarks", "humanevalplus"]) == 0
    result = read_result(output / "benchmark.json")
    assert result.model.digest == model_digest(DyLoRA_MoE.from_pretrained(output / "best_model"))
    assert list(result.benchmarks) == ["humanevalplus"] and "humanevalplus: pass@1" in capsys.readouterr().out


def test_a_missing_sandbox_fails_before_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(unsafe: bool = False) -> Any:
        raise EvaluationError("no sandbox holds")

    monkeypatch.setattr(live_benchmark, "choose_sandbox", refuse)
    assert main([*arguments, str(tmp_path / "out"), "--benchmark_strategy", "final"]) == EXIT_USER_ERROR
    assert "no sandbox holds" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert main([*arguments, str(tmp_path / "out"), "--benchmark_strategy", "always"]) == EXIT_USER_ERROR
    assert "--benchmark_strategy must be one of none, epoch, final, got 'always'" in capsys.readouterr().err
