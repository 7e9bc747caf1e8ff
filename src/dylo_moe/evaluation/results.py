"""Results of benchmark runs: their records, the file that holds one, and the comparison of two.

A result file is whole or absent. All scores are fractions from 0 to 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dylo_moe.durable import atomic_file
from dylo_moe.errors import ConfigError
from dylo_moe.evaluation.generation import SamplingSettings
from dylo_moe.evaluation.pass_at_k import paired_bootstrap, pass_at_k, standard_error, wilson_interval

_KS = (1, 10, 100)
"""Values of k in pass@k; those up to the number of samples are reported."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRecord(_Record):
    """The model that wrote the samples.

    Attributes:
        name: Where the model came from: a checkpoint folder, a Hub id or a folder.
        kind: ``mixture``, or ``base`` for a plain causal LM.
        digest: Digest of the parameters in memory while it sampled; see ``model_digest``.
        dtype: Floating type of the base model.
    """

    name: str
    kind: Literal["mixture", "base"]
    digest: str
    dtype: str


class Settings(SamplingSettings):
    """Settings of a run; all must be present in a file.

    Attributes:
        prompt_style: Name of the prompt style.
        max_samples: Maximum number of problems of each benchmark; None for all.
        evalplus: Whether the problems, tests and sanitizer are EvalPlus's.
    """

    prompt_style: str
    max_samples: int | None
    evalplus: bool

    @model_validator(mode="after")
    def _require_all(self) -> Self:
        missing = [name for name in type(self).model_fields if name not in self.model_fields_set]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)}")
        return self


class VerdictRecord(_Record):
    """The judge's verdict on one sample; see ``comparison.Verdict``."""

    passed: bool
    status: str
    detail: str = ""


class Estimate(_Record):
    """A fraction from 0 to 1, with its standard error over the tasks and a 95% interval (Wilson's)."""

    value: float
    standard_error: float
    interval: tuple[float, float]


class BenchmarkRecord(_Record):
    """Result of one benchmark.

    Attributes:
        problems_hash: SHA-256 of its problems.
        pass_at: Estimate of pass@k by k.
        verdicts: Verdicts by task, one for each sample.
    """

    problems_hash: str
    pass_at: dict[int, Estimate]
    verdicts: dict[str, list[VerdictRecord]]

    def passed(self) -> dict[str, float]:
        """Return the fraction of each task's samples that passed."""
        return {
            task: sum(verdict.passed for verdict in verdicts) / len(verdicts)
            for task, verdicts in self.verdicts.items()
        }


class BenchmarkResult(_Record):
    """Result of one run.

    Attributes:
        prompts_hash: SHA-256 of the prompts.
        batch_size: Batch size of the process that finished the run.
        sandbox: Name of the sandbox that the answers ran in.
        started: Start of that process in UTC, ISO 8601.
        seconds: Its wall-clock time, generation and judging together.
        generation_seconds: Its generation time, which excludes samples that an earlier process left.
        generated_tokens: Number of tokens generated in that time.
        tokens: Number of tokens of all samples.
        samples: Number of all samples.
        cut_off: Number of samples that were truncated at ``max_new_tokens``.
        versions: Versions of Python and of the packages that affect the scores.
        benchmarks: Result of each benchmark by name.
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
    """Difference between two runs on one benchmark.

    Attributes:
        before: pass@1 of the first.
        after: pass@1 of the second.
        difference: ``after - before``.
        interval: 95% paired bootstrap interval of the difference.
        gained: Tasks that pass more often in the second.
        lost: Tasks that pass more often in the first.
        tasks: Number of tasks.
    """

    before: Estimate
    after: Estimate
    difference: float
    interval: tuple[float, float]
    gained: list[str]
    lost: list[str]
    tasks: int


def summarize(problems_hash: str, verdicts: Mapping[str, list[VerdictRecord]]) -> BenchmarkRecord:
    """Return the record of one benchmark.

    Args:
        problems_hash: SHA-256 of its problems.
        verdicts: Verdicts by task, the same number for each.
    """
    count = min(len(found) for found in verdicts.values())
    pass_at = {}
    for k in [k for k in _KS if k <= count]:
        values = [pass_at_k(len(found), sum(one.passed for one in found), k) for found in verdicts.values()]
        mean = sum(values) / len(values)
        interval = wilson_interval(mean, len(values))
        pass_at[k] = Estimate(value=mean, standard_error=standard_error(values), interval=interval)
    return BenchmarkRecord(problems_hash=problems_hash, pass_at=pass_at, verdicts=dict(verdicts))


def compare_results(before: BenchmarkResult, after: BenchmarkResult) -> dict[str, Difference]:
    """Return the difference between two results on each benchmark that both have, paired by task.

    Raises:
        ConfigError: They share no benchmark, or differ in prompts, problems or tests.
    """
    shared = [name for name in before.benchmarks if name in after.benchmarks]
    if not shared:
        raise ConfigError(
            f"`compare` needs a benchmark that both results have: the first has {', '.join(before.benchmarks)}, the "
            f"second {', '.join(after.benchmarks)}"
        )
    if before.settings.evalplus != after.settings.evalplus:
        raise ConfigError("`compare` needs results of the same tests, and one of them was made with `no_evalplus`")
    if before.prompts_hash != after.prompts_hash:
        raise ConfigError(
            f"`compare` needs results on the same prompts: the first has prompt style {before.settings.prompt_style} "
            f"and {before.samples} samples, the second {after.settings.prompt_style} and {after.samples}; "
            "run both with the same `prompt_style`, `benchmarks` and `max_samples`"
        )
    return {name: _difference(name, before.benchmarks[name], after.benchmarks[name]) for name in shared}


def _difference(name: str, before: BenchmarkRecord, after: BenchmarkRecord) -> Difference:
    if before.problems_hash != after.problems_hash:
        raise ConfigError(f"`compare` needs results on the same problems, and those of {name} differ; run both again")
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
    """Read a result.

    Raises:
        ConfigError: The file cannot be read, or is not a result.
    """
    try:
        return BenchmarkResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the result {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path} is not a result of this program: {place}: {first['msg']}") from error
