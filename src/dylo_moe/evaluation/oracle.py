"""Whether outputs are right: EvalPlus's rules on plain values, or a benchmark's own test run on them.

Runs in a process that runs none of an answer: what it sees of one is values that ``wire`` decoded. The rules restate
``evalplus.eval.unsafe_execute`` of 0.3.1, which runs the answer in the process that compares, with two differences:
a right answer to HumanEval/32 passes (there, it is never noted down), and values too large to travel are compared
exactly, where EvalPlus allows floats to be off by 1e-6.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dylo_moe.evaluation import wire
from dylo_moe.evaluation.problems import Problem

FAILURES = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What comparing values of the wrong kind raises: such an answer is wrong, as in EvalPlus."""


class Diverged(ValueError):
    """A test asked for something else than when it was recorded, because of what it had been answered."""


def first_wrong(problem: Problem, inputs: Sequence[Any], expected: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """The number of the first input whose output is wrong, by EvalPlus's rules; None if all are right."""
    from evalplus.eval import is_floats

    # the tolerance that one float brings stays for the rest of the suite, as in EvalPlus
    tolerance = problem.atol
    for number, (arguments, wanted, output) in enumerate(zip(inputs, expected, outputs, strict=True)):
        if number in (0, len(problem.base_inputs)):
            tolerance = problem.atol
        if tolerance == 0 and is_floats(wanted):
            tolerance = 1e-6
        try:
            right = _right(problem, arguments, wanted, output, tolerance)
        except FAILURES:
            right = False
        if not right:
            return number
    return None


def _right(problem: Problem, arguments: Any, wanted: Any, output: Any, tolerance: float) -> bool:
    name = problem.entry_point
    if isinstance(wanted, wire.Digest) or isinstance(output, wire.Digest):
        return _digest(wanted) == _digest(output)
    if problem.benchmark.startswith("humaneval"):
        if name == "find_zero":
            from evalplus.eval._special_oracle import _poly

            return bool(abs(_poly(*arguments, output)) <= tolerance)
        exact = output == wanted
    else:
        exact, wanted = _mbpp_exact(name, arguments, wanted, output, tolerance)
    if exact or tolerance == 0:
        return bool(exact)
    import numpy

    if type(output) is not type(wanted) or (isinstance(wanted, list | tuple) and len(output) != len(wanted)):
        return False
    return bool(numpy.allclose(output, wanted, rtol=1e-7, atol=tolerance))


def _mbpp_exact(name: str, arguments: Any, wanted: Any, output: Any, tolerance: float) -> tuple[Any, Any]:
    """EvalPlus's special rules for MBPP: whether the output is right without tolerance, and what was wanted."""
    from evalplus.eval import _special_oracle as special

    if name in special.MBPP_OUTPUT_SET_EQ_TASKS:
        return set(output) == set(wanted), wanted
    if name in special.MBPP_OUTPUT_NOT_NONE_TASKS:
        wanted = wanted is not None
        return (output if isinstance(output, bool) else output is not None) == wanted, wanted
    exact = output == wanted
    if name == "are_equivalent":
        return True, wanted
    if name == "sum_div":
        return exact or output == 0, wanted
    if name == "surface_Area":
        return exact or abs(output - special._surface_Area(*arguments)) <= tolerance, wanted
    if name == "digit_distance_nums":
        return exact or output == special._digit_distance_nums(*arguments), wanted
    return exact, wanted


def _digest(value: Any) -> wire.Digest:
    return value if isinstance(value, wire.Digest) else wire.Digest.of(value)


def record(problem: Problem) -> tuple[list[str], list[str]]:
    """The calls that a problem's test makes of a right answer.

    Returns:
        The arguments of each call, encoded, and the names of those that only the answer's own classes can make.
    """
    calls: list[str] = []
    used: set[str] = set()

    def candidate(reference: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(wire.encode(list(arguments), names, wire.WHOLE))
            used.update(name for name, value in names.items() if any(value is argument for argument in arguments))
            return reference(*arguments)

        return call

    with contextlib.suppress(*FAILURES):  # a test that fails on a right answer fails again when it is judged
        _run_test(problem, candidate)
    return calls, sorted(used)


def test_passes(problem: Problem, inputs: Sequence[str], outputs: Sequence[Any]) -> bool:
    """Whether a problem's test is content with an answer that gave these outputs for the recorded inputs."""

    def candidate(reference: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
        answered: Iterator[tuple[str, Any]] = iter(zip(inputs, outputs, strict=True))

        def call(*arguments: Any) -> Any:
            recorded, output = next(answered, (None, None))
            if recorded is None or wire.decode(recorded, names) != list(arguments):
                raise Diverged
            return output

        return call

    try:
        _run_test(problem, candidate)
    except FAILURES:
        return False
    return True


test_passes.__test__ = False  # type: ignore[attr-defined] # pytest takes it for a test


def _run_test(
    problem: Problem, candidate: Callable[[Callable[..., Any], Mapping[str, Any]], Callable[..., Any]]
) -> None:
    """Runs the test with ``candidate(reference, names)`` in the answer's place, drawing the same numbers each time."""
    solution: dict[str, Any] = {}
    exec(problem.reference, solution)
    # a copy: a reference that calls itself must not call the candidate
    namespace = dict(solution)
    exec(problem.setup, namespace)
    names = {name: value for name, value in namespace.items() if name not in solution}
    namespace[problem.entry_point] = candidate(solution[problem.entry_point], names)
    state = random.getstate()
    random.seed(0)
    try:
        exec(problem.test, namespace)
    finally:
        random.setstate(state)
