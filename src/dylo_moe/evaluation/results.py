"""What a benchmark run found, as a file that is whole or not there, and how two of them compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dylo_moe.durable import atomic_file
from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.statistics import paired_bootstrap, pass_at_k, standard_error, wilson_interval

KS = (1, 10, 100)
"""The k of pass@k; those are given that the number of samples allows."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRecord(_Record):
    """Which model wrote the samples.

    Attributes:
        name: Where it came from: a checkpoint folder, a Hub id or a folder.
        kind: A mixture, or a plain causal LM.
        digest: Of what was in memory when it sampled; see ``identity.model_digest``.
        dtype: The base model's floating type.
    """

    name: str
    kind: Literal["mixture", "base"]
    digest: str
    dtype: str


class Settings(_Record):
    """How the samples were made; see ``generation.GenerationSettings``."""

    prompt_style: str
    max_new_tokens: int
    temperature: float
    num_beams: int
    n_samples: int
    seed: int
    max_samples: int | None
    evalplus: bool


class VerdictRecord(_Record):
    """What the judge said of one sample."""

    passed: bool
    status: str
    detail: str = ""


class Estimate(_Record):
    """A fraction from 0 to 1, with its standard error over the tasks and a 95% interval (Wilson's)."""

    value: float
    standard_error: float
    interval: tuple[float, float]


class BenchmarkRecord(_Record):
    """One benchmark.

    Attributes:
        problems_hash: Of its problems.
        pass_at: By k.
        verdicts: By task, one for each sample.
    """

    problems_hash: str
    pass_at: dict[int, Estimate]
    verdicts: dict[str, list[VerdictRecord]]

    def passed(self) -> dict[str, float]:
        """The share of each task's samples that passed."""
        return {
            task: sum(verdict.passed for verdict in verdicts) / len(verdicts)
            for task, verdicts in self.verdicts.items()
        }


class BenchmarkResult(_Record):
    """One run.

    Attributes:
        prompts_hash: Of the texts that the model went on from.
        batch_size: Of the run that finished.
        sandbox: What the answers ran in.
        started: UTC, ISO 8601.
        seconds: Wall-clock time of this process, generation and judging together.
        generation_seconds: Of its generation; samples that an earlier run left took none of it.
        generated_tokens: In that time.
        tokens: Of all samples.
        samples: All of them.
        cut_off: Samples that ended at ``max_new_tokens``.
        versions: Of what had a part in it.
    """

    format_version: Literal[1] = 1
    model: ModelRecord
    settings: Settings
    prompts_hash: str
    batch_size: int
    sandbox: str
    started: str
    seconds: float
    generation_seconds: float
    generated_tokens: int
    tokens: int
    samples: int
    cut_off: int
    versions: dict[str, str]
    benchmarks: dict[str, BenchmarkRecord]


class Difference(_Record):
    """One benchmark of two runs.

    Attributes:
        before: pass@1 of the first.
        after: pass@1 of the second.
        difference: ``after - before``.
        interval: Its 95% paired bootstrap interval.
        gained: Tasks that the second passes more often.
        lost: Tasks that the first passes more often.
        tasks: How many.
    """

    before: Estimate
    after: Estimate
    difference: float
    interval: tuple[float, float]
    gained: list[str]
    lost: list[str]
    tasks: int


def summarised(problems_hash: str, verdicts: Mapping[str, list[VerdictRecord]]) -> BenchmarkRecord:
    """The record of one benchmark from the verdicts on its samples, the same number for each task."""
    count = min(len(found) for found in verdicts.values())
    pass_at = {
        k: _estimate([pass_at_k(len(found), sum(one.passed for one in found), k) for found in verdicts.values()])
        for k in KS
        if k <= count
    }
    return BenchmarkRecord(problems_hash=problems_hash, pass_at=pass_at, verdicts=dict(verdicts))


def _estimate(values: list[float]) -> Estimate:
    mean = sum(values) / len(values)
    return Estimate(value=mean, standard_error=standard_error(values), interval=wilson_interval(mean, len(values)))


def compared(before: BenchmarkResult, after: BenchmarkResult) -> dict[str, Difference]:
    """The benchmarks that two results share, task by task.

    Raises:
        ConfigError: They share none, or were not asked or judged alike.
    """
    shared = [name for name in before.benchmarks if name in after.benchmarks]
    if not shared:
        raise ConfigError(
            f"--compare needs a benchmark that both have: the first has {', '.join(before.benchmarks)}, the second "
            f"{', '.join(after.benchmarks)}"
        )
    if before.settings.evalplus != after.settings.evalplus:
        raise ConfigError("--compare needs results of the same tests, and one of them was made with --no_evalplus")
    if before.prompts_hash != after.prompts_hash:
        raise ConfigError(
            f"--compare needs results on the same prompts: the first has prompt style {before.settings.prompt_style} "
            f"and {before.samples} samples, the second {after.settings.prompt_style} and {after.samples}; "
            "run both with the same --prompt_style, --benchmarks and --max_samples"
        )
    return {name: _difference(name, before.benchmarks[name], after.benchmarks[name]) for name in shared}


def _difference(name: str, before: BenchmarkRecord, after: BenchmarkRecord) -> Difference:
    if before.problems_hash != after.problems_hash:
        raise ConfigError(f"--compare needs results on the same problems, and those of {name} differ; run both anew")
    old, new = before.passed(), after.passed()
    tasks = list(old)
    return Difference(
        before=before.pass_at[1],
        after=after.pass_at[1],
        difference=after.pass_at[1].value - before.pass_at[1].value,
        interval=paired_bootstrap([old[task] for task in tasks], [new[task] for task in tasks]),
        gained=[task for task in tasks if new[task] > old[task]],
        lost=[task for task in tasks if new[task] < old[task]],
        tasks=len(tasks),
    )


def write_result(path: Path, result: BenchmarkResult) -> None:
    """Write a result and replace the file at ``path``; a reader sees the old one or the new one.

    Raises:
        OSError: It could not be written; what was at ``path`` is intact.
    """
    with atomic_file(path) as file:
        file.write(result.model_dump_json(indent=2) + "\n")


def read_result(path: Path) -> BenchmarkResult:
    """Reads a result.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        return BenchmarkResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the result {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path} is no result of this program: {place}: {first['msg']}") from error
