"""Right answers pass, wrong ones do not, by EvalPlus's rules, and load changes no verdict."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.candidate import process
from dylo_moe.evaluation.judging import comparison, expected_outputs
from dylo_moe.evaluation.judging.judge import Judge, Verdict
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import runner, self_check
from dylo_moe.evaluation.sandbox.runner import UNSAFE, Sandbox, SandboxRun
from dylo_moe.evaluation.sandbox.self_check import choose_sandbox, find_leaks

needs_evalplus = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import evalplus"], check=False, capture_output=True).returncode != 0,
    reason="evalplus is not installed",
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    try:
        choice = choose_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))
    with Judge(choice.sandbox, workers=2, cache=tmp_path_factory.mktemp("expected")) as found:
        yield found


def problem(name: str, body: str, inputs: Sequence[Any], benchmark: str = "humanevalplus", **more: Any) -> Problem:
    """Return a problem whose canonical solution is ``def name(*a): body``."""
    return Problem("Test/0", benchmark, "", name, f"def {name}(*a):\n    {body}\n", base_inputs=inputs, **more)


def passes(judge: Judge, task: Problem, body: str) -> bool:
    return judge.judge(task, f"def {task.entry_point}(*a):\n    {body}\n").passed


@needs_evalplus
@pytest.mark.parametrize(
    ("wanted", "given", "right"),
    [
        ("[1, 2]", "[1, 2]", True),
        ("[1, 2]", "(1, 2)", False),
        ("1", "1.0", True),
        ("1", "True", True),
        ("{'a': 2}", "__import__('collections').Counter('aa')", True),
        ("0.3", "0.1 + 0.2", True),
        ("[0.3, 1.0]", "[0.1 + 0.2, 1.0]", True),
        ("[0.3, 1.0]", "(0.1 + 0.2, 1.0)", False),
        ("[0.3, 1.0]", "[0.1 + 0.2, 1.0, 2.0]", False),
        ("0.3", "0.3001", False),
        ("0.3", "__import__('numpy').float64(0.3)", True),
        ("3", "3.0000001", False),
        ("'x' * 10**6", "'x' * 10**6", True),
        ("'x' * 10**6", "'x' * (10**6 - 1) + 'y'", False),
        ("None", "None", True),
    ],
)
def test_outputs_are_compared_by_evalplus_rules(wanted: str, given: str, right: bool, judge: Judge) -> None:
    assert passes(judge, problem("f", f"return {wanted}", [[1]]), f"return {given}") is right


@needs_evalplus
def test_the_tolerance_of_a_float_stays_for_the_suite_and_no_longer(judge: Judge) -> None:
    body = "return [0.5, (7, 0.1)][a[0]]"
    near = "return [0.5, (7, 0.1 + 1e-9)][a[0]]"
    assert passes(judge, problem("f", body, [[0], [1]]), near)
    assert not passes(judge, problem("f", body, [[1], [0]]), near)
    assert not passes(judge, problem("f", body, [[0]], plus_inputs=[[1]]), near)


FIND_ZERO = """
    begin, end = -1.0, 1.0
    value = lambda x: sum(c * x ** i for i, c in enumerate(a[0]))
    while value(begin) * value(end) > 0:
        begin, end = begin * 2, end * 2
    while end - begin > 1e-10:
        middle = (begin + end) / 2
        begin, end = (middle, end) if value(middle) * value(begin) > 0 else (begin, middle)
    return begin
"""


@needs_evalplus
def test_a_right_answer_to_humaneval_32_passes_and_changing_the_inputs_helps_no_wrong_one(judge: Judge) -> None:
    task = problem("find_zero", FIND_ZERO.strip(), [[[1, 2]], [[-6, 11, -6, 1]]], atol=1e-4)
    assert passes(judge, task, FIND_ZERO.strip().replace("return begin", "return end"))
    assert not passes(judge, task, "return 0.0")
    assert not passes(judge, task, "a[0][:] = [0] * len(a[0]); return 0.0")


@needs_evalplus
@pytest.mark.parametrize(
    ("name", "wanted", "given", "right"),
    [
        ("similar_elements", "(4, 5)", "[5, 4]", True),
        ("similar_elements", "(4, 5)", "[5, 4, 3]", False),
        ("similar_elements", "(4, 5)", "(number for number in (5, 4))", True),
        ("check_str", "__import__('re').match('a', 'a')", "True", True),
        ("check_str", "__import__('re').match('a', 'a')", "object()", True),
        ("check_str", "__import__('re').match('a', 'a')", "None", False),
        ("sum_div", "7", "0", True),
        ("digit_distance_nums", "1", "9", False),
        ("ordinary", "(4, 5)", "(5, 4)", False),
    ],
)
def test_mbpps_special_rules_hold(name: str, wanted: str, given: str, right: bool, judge: Judge) -> None:
    task = problem(name, f"return {wanted}", [[12, 13]], benchmark="mbppplus")
    assert passes(judge, task, f"return {given}") is right


TESTED = Problem(
    "Test/1",
    "humaneval",
    "def shift(text):\n    return text[1:] + text[:1]\n\ndef unshift(text):\n",
    "unshift",
    "    return text[-1:] + text[:-1]\n",
    test="""
def check(candidate):
    import random
    for _ in range(3):
        text = str(random.random())
        assert candidate(shift(text)) == text
    assert candidate(candidate("abc")) == "bca"
check(unshift)
""",
)


def test_a_benchmarks_own_test_decides(judge: Judge) -> None:
    assert judge.judge(TESTED, TESTED.reference).passed
    assert judge.judge(TESTED, "def unshift(text):\n    return text") == Verdict(False, "wrong", "its test fails")
    once = "def unshift(text):\n    return 'bca' if text == 'cab' else text[-1:] + text[:-1]"
    assert judge.judge(TESTED, once).passed
    assert judge.judge(TESTED, "def unshift(text):\n    return text[0]").status == "wrong"


def test_arguments_of_the_answers_own_classes_are_made_there(judge: Judge) -> None:
    task = Problem(
        "Mbpp/367",
        "mbpp",
        "",
        "depth",
        "class Node:\n    def __init__(self):\n        self.next = None\n"
        "def depth(node):\n    return 1 + depth(node.next) if node else 0\n",
        setup="root = Node()\nroot.next = Node()",
        test="assert depth(root) == 2",
    )
    assert judge.judge(task, task.reference).passed
    assert not judge.judge(task, task.reference.replace("1 +", "2 +")).passed
    assert judge.judge(task, "def depth(node):\n    return 2").status == "error"  # it has no Node


def test_a_wrong_canonical_solution_is_an_error(judge: Judge) -> None:
    task = Problem("Test/2", "mbpp", "", "f", "def f():\n    return 1\n", test="assert f() == 2")
    with pytest.raises(EvaluationError, match=r"Test/2: the canonical solution fails its own tests"):
        judge.judge(task, "def f():\n    return 2\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def unshift(text:\n", "SyntaxError"),
        ("x = 1\n", "KeyError: unshift"),
        ("import absent_module\n", "ModuleNotFoundError"),
        ("def unshift(text):\n    return {}[text]\n", "input 0: KeyError"),
        ("def unshift(text):\n    return input()\n", "input 0: EOFError"),
    ],
)
def test_an_answer_that_does_not_run_is_an_error_that_says_so(code: str, message: str, judge: Judge) -> None:
    verdict = judge.judge(TESTED, code)
    assert verdict.status == "error" and message in verdict.detail


def test_expected_outputs_are_computed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    real = Sandbox.run

    def counted(self: Sandbox, code: str, *arguments: Any, **more: Any) -> SandboxRun:
        runs.append(code)
        return real(self, code, *arguments, **more)

    monkeypatch.setattr(Sandbox, "run", counted)
    for _ in range(2):
        with Judge(UNSAFE, workers=2, cache=tmp_path) as judge:
            assert [verdict.passed for verdict in judge.judge_many([(TESTED, "x = 1"), (TESTED, "x = 2")])] == [
                False
            ] * 2
    assert runs.count(TESTED.reference) == 1 and len(runs) == 5


def test_a_timeout_has_a_second_try_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, together, tries = set(), [], []
    real = Sandbox.run

    def watched(self: Sandbox, code: str, *arguments: Any, **more: Any) -> SandboxRun:
        running.add(threading.get_ident())
        try:
            if "slow" in code:
                tries.append(len(running))
                first = len(tries) == 1
                return SandboxRun("timeout", (), "") if first else real(self, TESTED.reference, *arguments, **more)
            found = real(self, code, *arguments, **more)
            together.append(len(running))
            return found
        finally:
            running.discard(threading.get_ident())

    monkeypatch.setattr(Sandbox, "run", watched)
    others = [(TESTED, f"{TESTED.reference}\n# {number}") for number in range(6)]
    with Judge(UNSAFE, workers=3, cache=tmp_path) as judge:
        verdicts = list(judge.judge_many([*others[:3], (TESTED, "slow"), *others[3:]]))
    assert all(verdict.passed for verdict in verdicts)
    assert len(tries) == 2 and tries[1] == 1 and max(together) > 1


def test_limits_follow_the_canonical_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected_outputs, "LIMIT_FLOOR", 0.05)
    spin = "import time\n    end = time.process_time() + {}\n    while time.process_time() < end: pass\n    return 1"
    task = problem("f", spin.format(0.2), [[1]], test="assert f(1) == 1")
    with Judge(UNSAFE, workers=1, cache=tmp_path) as judge:
        assert passes(judge, task, spin.format(0.3))
        assert judge.judge(task, f"def f(*a):\n    {spin.format(3)}").status == "timeout"


def test_a_sandbox_that_does_not_hold_is_detected() -> None:
    assert "the canary could read a private file" in find_leaks(UNSAFE)
    assert find_leaks(Sandbox("bubblewrap", "/bin/false", ""))[0].startswith("the canary did not run")
    assert find_leaks(Sandbox("bubblewrap", "/absent", ""))[0].startswith("it cannot be started")


def test_going_without_a_sandbox_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "available_sandboxes", lambda: [UNSAFE])
    with pytest.raises(EvaluationError, match="`unsafe_no_sandbox`"):
        choose_sandbox()
    choice = choose_sandbox(unsafe=True)
    assert choice.sandbox == UNSAFE and "NO SANDBOX" in choice.describe()


def test_a_comparison_without_end_ends_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = Problem("Test/3", "mbpp", "", "f", "def f():\n    return 0\n", test="x = f()\nwhile x: pass")
    with Judge(UNSAFE, workers=1, cache=tmp_path) as judge:
        assert judge.judge(task, task.reference).passed
        with monkeypatch.context() as patch:
            patch.setattr(comparison, "PATIENCE", 0.5)
            assert judge.judge(task, "def f():\n    return 1").status == "output"
        assert judge.judge(task, task.reference).passed


def test_the_process_of_an_answer_loads_the_standard_library_alone() -> None:
    _, program = runner.start_arguments(process.__name__)
    loads = program.replace("main()", "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-S", "-c", loads], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"dylo_moe.evaluation.candidate.codec", "json"} <= loaded
    assert not {"torch", "numpy", "evalplus", "dylo_moe.registration", "dylo_moe.errors"} & loaded


def test_the_comparing_process_loads_no_torch() -> None:
    _, program = runner.start_arguments(comparison.__name__)
    loads = program.replace("main()", "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    assert "dylo_moe.evaluation.judging.checker" in done.stdout.split()
    assert not {"torch", "dylo_moe.registration"} & set(done.stdout.split())
