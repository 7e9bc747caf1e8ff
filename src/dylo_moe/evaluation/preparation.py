"""What is needed to judge answers to a problem, from its canonical solution, kept on disk by content.

The canonical solution runs in the sandbox like an answer. Its outputs are what is expected, and its processor time
sets the limits of the answers, so that these do not depend on how quick a machine is.
"""

import hashlib
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.durable import atomic_file
from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation import wire
from dylo_moe.evaluation.comparer import Comparer
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import Allowance, Sandbox

LIMIT_FLOOR, LIMIT_FACTOR = 1.0, 4.0
"""A call's limit in seconds of processor time: the floor, or so many times the canonical solution's, as in EvalPlus."""

CODE_LIMIT = 5.0
"""Seconds of processor time for what an answer does before it is called: imports, mostly."""

CPU_FLOOR, CPU_FACTOR = 30.0, 2.0
"""The limit of a whole run in seconds of processor time: the floor, or so many times the canonical solution's."""

OUTPUT_FLOOR, OUTPUT_FACTOR = 1 << 18, 4
"""The same in bytes of output."""

_CANONICAL_LIMIT, _CANONICAL_CPU, _CANONICAL_OUTPUT = 60.0, 600, 1 << 28
_SOURCES = ("answer_process.py", "oracle.py", "wire.py")


@dataclass(frozen=True)
class Prepared:
    """What judging needs.

    Attributes:
        inputs: The arguments of each call, encoded.
        names: Arguments that ``Problem.setup`` makes.
        expected: What the canonical solution's process wrote for each call.
        allowance: What an answer may use.
    """

    inputs: tuple[bytes, ...]
    names: tuple[str, ...]
    expected: tuple[bytes, ...]
    allowance: Allowance


def prepare(problem: Problem, sandbox: Sandbox, comparer: Comparer, cache: Path) -> Prepared:
    """Runs the canonical solution, unless the cache knows what came of it.

    Raises:
        EvaluationError: The canonical solution does not pass its own test.
    """
    inputs = [wire.encode(list(arguments), largest=wire.WHOLE) for arguments in problem.inputs]
    file = cache / f"{_key(problem, inputs)}.json"
    if file.exists():
        inputs, names, lines = json.loads(file.read_text())
    else:
        names = []
        if problem.test:
            inputs, names = comparer.record(problem)
        lines = _canonical_lines(problem, sandbox, comparer, inputs, names)
        _keep(file, json.dumps([inputs, names, lines]))
    seconds = [json.loads(line)[2] for line in lines]
    allowance = Allowance(
        limits=(CODE_LIMIT, *(max(LIMIT_FLOOR, LIMIT_FACTOR * time) for time in seconds)),
        cpu=math.ceil(max(CPU_FLOOR, CPU_FACTOR * sum(seconds))),
        output=max(OUTPUT_FLOOR, OUTPUT_FACTOR * sum(map(len, lines))),
    )
    expected = () if problem.test else tuple(line.encode() for line in lines)
    return Prepared(tuple(line.encode() for line in inputs), tuple(names), expected, allowance)


def _canonical_lines(
    problem: Problem, sandbox: Sandbox, comparer: Comparer, inputs: list[str], names: list[str]
) -> list[str]:
    """What the canonical solution writes for each input."""
    allowance = Allowance((_CANONICAL_LIMIT,) * (len(inputs) + 1), _CANONICAL_CPU, _CANONICAL_OUTPUT)
    encoded = [line.encode() for line in inputs]
    run = sandbox.run(problem.reference, problem.entry_point, encoded, allowance, problem.setup, names)
    if run.status != "finished":
        raise EvaluationError(f"{problem.task_id}: the canonical solution fails here: {run.status}, {run.detail}")
    verdict = comparer.compare(problem, encoded, run.lines[1:], run.lines)
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


def _key(problem: Problem, inputs: list[str]) -> str:
    """A SHA-256 of all that the outputs depend on."""
    content = [problem.reference, problem.entry_point, problem.test, problem.setup, problem.benchmark, inputs]
    own = [Path(__file__).with_name(name).read_text() for name in _SOURCES]
    return hashlib.sha256(json.dumps([content, own, platform.python_version()]).encode()).hexdigest()
