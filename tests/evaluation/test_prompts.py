"""Prompts, stop strings, and the part of an answer that is judged."""

import sys
import warnings

import pytest

from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.prompts import PromptStyle, make_sanitizer

TASK = 'def up(n):\n    """Add one."""\n'


def chat(instruction: str) -> str:
    return f"<user>{instruction}<model>"


def test_a_completion_continues_the_task() -> None:
    style = PromptStyle()
    assert style.render(TASK) == TASK
    assert style.answer(TASK, "    return n + 1") == TASK + "    return n + 1"
    assert "\ndef " in style.stops("humanevalplus") and "\nassert" in style.stops("mbpp")


def test_a_conversation_asks_for_a_script_and_opens_the_answer() -> None:
    style = PromptStyle("chat", chat)
    text = style.render(TASK)
    assert text.startswith("<user>Please provide a self-contained Python script")
    assert f"```\n{TASK}```\n<model>" in text and text.endswith("\n```python\n")
    assert style.answer(TASK, "def up(n): return n + 1") == "def up(n): return n + 1"
    assert "\n```" in style.stops("humaneval") and "\ndef " not in style.stops("humaneval")


def test_the_sanitizer_keeps_what_the_function_needs() -> None:
    pytest.importorskip("evalplus")
    sanitize = make_sanitizer()
    answer = (
        "import os\nSTEP = 1\n\ndef other():\n    return 2\n\ndef up(n):\n    return n + STEP\n\nprint(up(1))\nand so"
    )
    kept = sanitize(answer, "up")
    assert "return n + STEP" in kept and "STEP = 1" in kept
    assert "print" not in kept and "other" not in kept and "and so" not in kept


@pytest.mark.parametrize(
    "text", ["", "\0", "(" * 10_000, "x = " + "-" * 100_000 + "1", '"\\d"\ndef up(n): return n'], ids=range(5)
)
def test_whatever_a_model_writes_the_sanitizer_does_not_raise_or_warn(text: str) -> None:
    pytest.importorskip("evalplus")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(make_sanitizer()(text, "up"), str)


def test_without_evalplus_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evalplus.sanitize", None)
    with pytest.raises(EvaluationError, match="`no_evalplus`"):
        make_sanitizer()
