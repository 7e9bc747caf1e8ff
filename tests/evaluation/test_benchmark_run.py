"""A run scores the given model, resumes by sample, and fails if an answer cannot be judged."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import ConfigError
from dylo_moe.evaluation import benchmark_run as run_module
from dylo_moe.evaluation.benchmark_run import BenchmarkPrompts, BenchmarkRun
from dylo_moe.evaluation.generation import GenerationSettings, Model
from dylo_moe.evaluation.judging.comparison import Verdict
from dylo_moe.evaluation.model_digest import model_digest
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.prompts import PromptStyle
from dylo_moe.evaluation.results import BenchmarkResult
from tests.support.tiny_models import taught_mixture, tiny_base, tiny_mixture

ANSWER = "    return number + 1"


def problem(number: int, benchmark: str = "humaneval") -> Problem:
    return Problem(
        task_id=f"Task/{number}",
        benchmark=benchmark,
        prompt=f"def add_{number}(number):\n",
        entry_point=f"add_{number}",
        canonical_solution=f"{ANSWER}\n",
    )


PROBLEMS = [problem(number) for number in range(3)]


class ReadingJudge:
    """Fake judge that passes an answer if its text is the reference; the real one is tested elsewhere."""

    def __init__(self) -> None:
        self.judged: list[str] = []

    def submit(self, problem: Problem, code: str) -> "Future[Verdict]":
        self.judged.append(code)
        future: Future[Verdict] = Future()
        passed = code.strip() == problem.reference.strip()
        future.set_result(Verdict(passed, "passed" if passed else "wrong"))
        return future


def score(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    problems: dict[str, list[Problem]] | None = None,
    judge: Any = None,
    **settings: Any,
) -> BenchmarkResult:
    prompts = BenchmarkPrompts(
        problems or {"humaneval": PROBLEMS}, PromptStyle(), lambda text: tokenizer(text).input_ids, evalplus=False
    )
    sampling = GenerationSettings(**{"max_new_tokens": 40, **settings})
    run = BenchmarkRun(model, "tiny", tokenizer, prompts, sampling)
    return run.run(judge or ReadingJudge(), folder / "samples.jsonl", sandbox="none")


def test_the_mixture_is_scored_and_not_its_base(tmp_path: Path) -> None:
    base, tokenizer = tiny_base()
    before = score(base, tokenizer, tmp_path / "base")
    mixture = taught_mixture(base, tokenizer, PROBLEMS[0].prompt, ANSWER)
    after = score(mixture, tokenizer, tmp_path / "mixture")
    assert not before.benchmarks["humaneval"].verdicts["Task/0"][0].passed
    assert after.benchmarks["humaneval"].verdicts["Task/0"][0].passed
    assert before.benchmarks["humaneval"].pass_at[1].value == 0.0
    assert after.benchmarks["humaneval"].pass_at[1].value >= 1 / 3
    assert (before.model.kind, after.model.kind) == ("base", "mixture")
    # a loaded checkpoint has the same digest
    mixture.save_pretrained(tmp_path / "checkpoint")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "checkpoint", tiny_base()[0])
    assert score(loaded, tokenizer, tmp_path / "loaded").model.digest == after.model.digest != before.model.digest
    # switched-off experts are not scored
    with mixture.base_only():
        off = score(mixture, tokenizer, tmp_path / "off")
    assert off.benchmarks["humaneval"].pass_at[1].value == 0.0 and off.model.digest != after.model.digest


def test_the_digest_depends_on_everything_that_answers_depend_on() -> None:
    model, _ = tiny_mixture()
    seen = [model_digest(model)]
    assert model_digest(tiny_mixture()[0]) == seen[0]
    model.router.expert_load.add_(1)  # routing does not use it
    assert model_digest(model) == seen[0]

    def changed() -> None:
        digest = model_digest(model)
        assert digest not in seen
        seen.append(digest)

    model.router.gates[0].data[0, 0] += 1e-3
    changed()
    next(value for name, value in model.named_parameters() if "lora_A" in name).data[0, 0] += 1e-3
    changed()
    model.set_maturity(0)
    changed()
    model.experts.set_active("expert_1")
    changed()
    next(iter(model.experts.base_model.parameters())).data.add_(0.1)
    changed()


def test_an_interrupted_run_resumes_by_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_mixture()
    model.double()
    settings = {"temperature": 0.8, "n_samples": 3, "batch_size": 2, "max_new_tokens": 20}
    whole = score(model, tokenizer, tmp_path / "whole", **settings)
    generate, calls = model.generate, []

    def interrupted(**kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(model, tokenizer, tmp_path / "cut", **settings)
    resumed = score(model, tokenizer, tmp_path / "cut", **settings)
    assert sum(calls) - calls[2] == 9, "no sample is generated twice"
    assert (resumed.benchmarks, resumed.samples, resumed.tokens) == (whole.benchmarks, whole.samples, whole.tokens)
    assert 0 < resumed.generated_tokens < whole.generated_tokens

    def lines(folder: str) -> list[str]:
        return sorted((tmp_path / folder / "samples.jsonl").read_text().splitlines())

    assert lines("cut") == lines("whole")


def test_samples_of_another_model_or_of_other_settings_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_mixture()
    score(model, tokenizer, tmp_path)
    before = (tmp_path / "samples.jsonl").read_bytes()
    for other, settings, key in (
        (tiny_base()[0], {}, "model_digest"),
        (model, {"max_new_tokens": 30}, "max_new_tokens"),
        (model, {"problems": {"humaneval": PROBLEMS[:2]}}, "prompts_hash"),
    ):
        with pytest.raises(ConfigError, match=f"samples of another run: its {key} is"):
            score(other, tokenizer, tmp_path, **settings)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert score(model, tokenizer, tmp_path, batch_size=1).generated_tokens == 0


def test_benchmarks_with_the_same_tasks_share_their_samples(tmp_path: Path) -> None:
    model, tokenizer = tiny_mixture()
    judge = ReadingJudge()
    both = {name: [problem(number, name) for number in range(3)] for name in ("humaneval", "humanevalplus")}
    result = score(model, tokenizer, tmp_path, problems=both, judge=judge)
    assert result.samples == 3 and len(judge.judged) == 6
    assert list(result.benchmarks) == ["humaneval", "humanevalplus"]


def test_an_answer_that_cannot_be_judged_fails_the_run(tmp_path: Path) -> None:
    class Broken(ReadingJudge):
        def submit(self, problem: Problem, code: str) -> "Future[Verdict]":
            future = super().submit(problem, code)
            if problem.task_id == "Task/2":
                future = Future()
                future.set_exception(OSError("no process could be started"))
            return future

    model, tokenizer = tiny_mixture()
    with pytest.raises(OSError, match="no process could be started"):
        score(model, tokenizer, tmp_path, judge=Broken())
    assert score(model, tokenizer, tmp_path).generated_tokens == 0, "the samples are kept"


def test_answers_are_submitted_while_others_are_still_generated(tmp_path: Path) -> None:
    model, tokenizer = tiny_mixture()
    judge = ReadingJudge()
    submitted: list[int] = []
    generate = model.generate
    model.generate = lambda **kwargs: (submitted.append(len(judge.judged)), generate(**kwargs))[1]  # type: ignore
    score(model, tokenizer, tmp_path, judge=judge, batch_size=1, max_new_tokens=20)
    assert submitted == [0, 1, 2]


def test_pass_at_k_and_what_the_result_records(tmp_path: Path) -> None:
    base, tokenizer = tiny_base()
    model = taught_mixture(base, tokenizer, PROBLEMS[0].prompt, ANSWER)
    result = score(model, tokenizer, tmp_path, temperature=1.0, n_samples=10, problems={"humaneval": PROBLEMS[:1]})
    record = result.benchmarks["humaneval"]
    passed = sum(verdict.passed for verdict in record.verdicts["Task/0"])
    assert set(record.pass_at) == {1, 10}
    assert record.pass_at[1].value == pytest.approx(passed / 10) and 0 < passed < 10
    assert record.pass_at[10].value == 1.0
    assert result.versions["torch"] == torch.__version__ and set(run_module.VERSIONS) < set(result.versions)
    assert result.samples == 10 and result.tokens == result.generated_tokens > 10
    header = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert header["model_digest"] == result.model.digest and header["prompts_hash"] == result.prompts_hash
