"""Checks whether outputs are right: by EvalPlus's rules on plain values, or by the benchmark's own test run on them.

Runs in a process that runs no part of an answer: it sees only the values that ``codec`` decoded. The rules restate
``evalplus.eval.unsafe_execute`` of 0.3.1, which runs the answer in the process that compares, with two differences:
a right answer to HumanEval/32 passes (EvalPlus never counts it), and values too large to travel are compared exactly,
where EvalPlus allows floats an error of 1e-6.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dylo_moe.evaluation.candidate import codec
from dylo_moe.evaluation.problems import Problem

_FAILURES = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors from comparing values of the wrong kind: such an answer is wrong, as in EvalPlus."""

_Function = Callable[..., object]
_MakeCandidate = Callable[[_Function, Mapping[str, object]], _Function]
"""Makes the function under test from the canonical one and the arguments that ``Problem.setup`` made."""


class Diverged(ValueError):
    """A test made another call than when it was recorded, because an earlier call returned another value."""


def first_wrong(
    problem: Problem, inputs: Sequence[Sequence[object]], expected: Sequence[object], outputs: Sequence[object]
) -> int | None:
    """Return the index of the first input whose output is wrong by EvalPlus's rules, or None if all are right."""
    from evalplus.eval import is_floats

    # one expected float raises the tolerance for the rest of its suite, as in EvalPlus
    tolerance = problem.atol
    for number, (arguments, wanted, output) in enumerate(zip(inputs, expected, outputs, strict=True)):
        if number in (0, len(problem.base_inputs)):
            tolerance = problem.atol
        if tolerance == 0 and is_floats(wanted):
            tolerance = 1e-6
        try:
            right = _is_right(problem, arguments, wanted, output, tolerance)
        except _FAILURES:
            right = False
        if not right:
            return number
    return None


def _is_right(problem: Problem, arguments: Sequence[object], wanted: Any, output: Any, tolerance: float) -> bool:
    name = problem.entry_point
    if isinstance(wanted, codec.Digest) or isinstance(output, codec.Digest):
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


def _mbpp_exact(
    name: str, arguments: Sequence[object], wanted: Any, output: Any, tolerance: float
) -> tuple[object, object]:
    """Apply EvalPlus's special rules for MBPP: return whether the output is exactly right, and the expected value."""
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


def _digest(value: object) -> codec.Digest:
    return value if isinstance(value, codec.Digest) else codec.Digest.of(value)


def record_calls(problem: Problem) -> tuple[list[str], list[str]]:
    """Record the calls that a problem's test makes of the canonical solution.

    Returns:
        The arguments of each call, encoded, and the names of those that only the answer's own classes can make.
    """
    calls: list[str] = []
    used: set[str] = set()

    def recording(reference: _Function, names: Mapping[str, object]) -> _Function:
        def call(*arguments: object) -> object:
            calls.append(codec.encode(list(arguments), names, codec.UNLIMITED))
            used.update(name for name, value in names.items() if any(value is argument for argument in arguments))
            return reference(*arguments)

        return call

    with contextlib.suppress(*_FAILURES):  # a test that fails on the canonical solution fails again when it is judged
        _run_test(problem, recording)
    return calls, sorted(used)


def passes_test(problem: Problem, inputs: Sequence[str], outputs: Sequence[object]) -> bool:
    """Return whether a problem's test passes if the recorded calls return these outputs."""

    def replaying(reference: _Function, names: Mapping[str, object]) -> _Function:
        answered: Iterator[tuple[str | None, object]] = iter(zip(inputs, outputs, strict=True))

        def call(*arguments: object) -> object:
            recorded, output = next(answered, (None, None))
            if recorded is None or codec.decode(recorded, names) != list(arguments):
                raise Diverged
            return output

        return call

    try:
        _run_test(problem, replaying)
    except _FAILURES:
        return False
    return True


def _run_test(problem: Problem, make_candidate: _MakeCandidate) -> None:
    """Run a problem's test on the candidate, with the same random numbers each time."""
    solution: dict[str, Any] = {}
    exec(problem.reference, solution)
    # a copy: a reference that calls itself must not call the candidate
    namespace = dict(solution)
    exec(problem.setup, namespace)
    names = {name: value for name, value in namespace.items() if name not in solution}
    namespace[problem.entry_point] = make_candidate(solution[problem.entry_point], names)
    state = random.getstate()
    random.seed(0)
    try:
        exec(problem.test, namespace)
    finally:
        random.setstate(state)
