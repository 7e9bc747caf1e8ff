"""Expected outputs and limits for judging answers to a problem, cached on disk by content.

The canonical solution runs in the sandbox like an answer. Its outputs are the expected ones, and its CPU time sets the
limits of the answers, so that these do not depend on the speed of the machine.
"""

import hashlib
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.durable import atomic_file
from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.candidate import codec, process
from dylo_moe.evaluation.judging import checker
from dylo_moe.evaluation.judging.comparison import ComparisonWorker
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import ResourceLimits, Sandbox

LIMIT_FLOOR, LIMIT_FACTOR = 1.0, 4.0
"""Limit of one call in seconds of CPU time: at least the floor, else a multiple of the canonical solution's time.

The multiple is EvalPlus's.
"""

_CODE_LIMIT = 5.0
"""Seconds of CPU time before an answer is called, which go mostly to imports."""

CPU_FLOOR, CPU_FACTOR = 30.0, 2.0
"""Limit of a whole run in seconds of CPU time: at least the floor, else a multiple of the canonical solution's time."""

OUTPUT_FLOOR, OUTPUT_FACTOR = 1 << 18, 4
"""Limit of a whole run in bytes of output: at least the floor, else a multiple of the canonical solution's output."""

_CANONICAL_LIMIT, _CANONICAL_CPU, _CANONICAL_OUTPUT = 60.0, 600, 1 << 28
_SOURCES = [Path(source) for source in (process.__file__, codec.__file__, checker.__file__)]
"""Code that expected outputs depend on."""


@dataclass(frozen=True)
class ReferenceRun:
    """Inputs, expected outputs and limits of one problem.

    Attributes:
        inputs: The list of arguments of each call, encoded.
        names: Arguments that ``Problem.setup`` makes.
        expected: The line that the canonical solution's process wrote for each call; empty if a test decides.
        limits: Limits of an answer.
    """

    inputs: tuple[bytes, ...]
    names: tuple[str, ...]
    expected: tuple[bytes, ...]
    limits: ResourceLimits


def run_reference(problem: Problem, sandbox: Sandbox, worker: ComparisonWorker, cache: Path) -> ReferenceRun:
    """Run the canonical solution, or read from the cache what an earlier run found.

    Raises:
        EvaluationError: The canonical solution does not pass its own test, or the cache cannot be written.
    """
    inputs = [codec.encode(list(arguments), max_text=codec.UNLIMITED) for arguments in problem.inputs]
    # all that the outputs depend on
    content = [problem.reference, problem.entry_point, problem.test, problem.setup, problem.benchmark, inputs]
    own = [source.read_text() for source in _SOURCES]
    key = hashlib.sha256(json.dumps([content, own, platform.python_version()]).encode()).hexdigest()
    file = cache / f"{key}.json"
    if file.exists():
        inputs, names, lines = json.loads(file.read_text())
    else:
        names = []
        if problem.test:
            inputs, names = worker.record(problem)
        lines = _canonical_lines(problem, sandbox, worker, inputs, names)
        _keep(file, json.dumps([inputs, names, lines]))
    seconds = [json.loads(line)[2] for line in lines]
    limits = ResourceLimits(
        call_seconds=(_CODE_LIMIT, *(max(LIMIT_FLOOR, LIMIT_FACTOR * time) for time in seconds)),
        cpu_seconds=math.ceil(max(CPU_FLOOR, CPU_FACTOR * sum(seconds))),
        output_bytes=max(OUTPUT_FLOOR, OUTPUT_FACTOR * sum(map(len, lines))),
    )
    expected = () if problem.test else tuple(line.encode() for line in lines)
    return ReferenceRun(tuple(line.encode() for line in inputs), tuple(names), expected, limits)


def _canonical_lines(
    problem: Problem, sandbox: Sandbox, worker: ComparisonWorker, inputs: list[str], names: list[str]
) -> list[str]:
    """Return the line that the canonical solution's process writes for each input."""
    limits = ResourceLimits((_CANONICAL_LIMIT,) * (len(inputs) + 1), _CANONICAL_CPU, _CANONICAL_OUTPUT)
    encoded = [line.encode() for line in inputs]
    run = sandbox.run(problem.reference, problem.entry_point, encoded, limits, problem.setup, names)
    if run.status != "finished":
        raise EvaluationError(f"{problem.task_id}: the canonical solution fails here: {run.status}, {run.detail}")
    verdict = worker.compare(problem, encoded, run.lines[1:], run.lines)
    if not verdict.passed:
        raise EvaluationError(f"{problem.task_id}: the canonical solution fails its own tests: {verdict.detail}")
    return [line.decode() for line in run.lines[1:]]


def _keep(file: Path, text: str) -> None:
    """Write a file of the cache."""
    try:
        with atomic_file(file) as opened:
            opened.write(text)
    except OSError as error:
        raise EvaluationError(
            f"cannot write {file} ({error.strerror}); set DYLO_MOE_CACHE to another folder"
        ) from error
