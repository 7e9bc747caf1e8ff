"""On EvalPlus's real tasks, also the unusual ones, right answers pass and wrong ones do not."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.judging.judge import Judge
from dylo_moe.evaluation.problems import Problem, load_problems
from dylo_moe.evaluation.sandbox.runner import UNSAFE

REAL = os.environ.get("DYLO_MOE_DATA", "")
pytestmark = pytest.mark.skipif(
    not REAL, reason="set DYLO_MOE_DATA to a folder with MbppPlus.jsonl.gz and HumanEvalPlus.jsonl.gz"
)

ODD = {
    "HumanEval/0": "return True",
    "HumanEval/32": "return 0.0",  # judged by its polynomial
    "HumanEval/38": "return a[0]",  # its own test calls a helper of the prompt
    "HumanEval/53": "return 0",
    "HumanEval/130": "return [1, 3]",  # outputs of megabytes
    "Mbpp/2": "return ()",  # compared as a set
    "Mbpp/88": "return {}",  # the canonical solution returns a Counter
    "Mbpp/124": "return 0.0",  # complex numbers
    "Mbpp/558": "return -1",  # a second right answer
    "Mbpp/737": "return None",  # judged by not being None
}


@pytest.fixture(scope="module")
def problems() -> Iterator[dict[str, Problem]]:
    humaneval = pytest.importorskip("evalplus.data.humaneval", reason="evalplus is not installed")
    mbpp = pytest.importorskip("evalplus.data.mbpp", reason="evalplus is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(Path(REAL) / "HumanEvalPlus.jsonl.gz"))
        patch.setattr(mbpp, "MBPP_OVERRIDE_PATH", str(Path(REAL) / "MbppPlus.jsonl.gz"))
        try:
            loaded = [*load_problems("humanevalplus"), *load_problems("mbppplus")]
        except EvaluationError as error:
            pytest.skip(str(error))
        yield {problem.task_id: problem for problem in loaded}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with Judge(UNSAFE, cache=tmp_path_factory.mktemp("expected")) as found:  # all code here is trusted
        yield found


def test_no_task_is_missing(problems: dict[str, Problem]) -> None:
    assert len(problems) == 164 + 378


@pytest.mark.parametrize("task", ODD)
def test_the_canonical_solution_passes_and_a_wrong_one_does_not(
    task: str, problems: dict[str, Problem], judge: Judge
) -> None:
    problem = problems[task]
    right, wrong = problem.reference, f"def {problem.entry_point}(*a):\n    {ODD[task]}\n"
    assert [verdict.status for verdict in judge.judge_many([(problem, right), (problem, wrong)])] == ["passed", "wrong"]
