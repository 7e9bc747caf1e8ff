"""Prompts for tasks, the strings at which an answer ends, and the part of an answer that is judged.

Instruction, opening of the answer and stop strings are EvalPlus's (Liu et al. 2023,
https://github.com/evalplus/evalplus), so that scores are comparable with published ones.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dylo_moe.errors import EvaluationError

COMPLETE = "complete"

_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
_OPENING = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
_FENCE = "\n```"
_COMPLETION_STOPS = {
    "humaneval": ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp": ('\n"""', "\nassert"),
}


@dataclass(frozen=True)
class PromptStyle:
    """Form in which tasks are put to a model.

    Attributes:
        name: ``complete`` for a text to continue; otherwise the name of the conversation's template.
        conversation: Function that wraps an instruction in its template, up to where the answer begins; None for
            ``complete``.
    """

    name: str = COMPLETE
    conversation: Callable[[str], str] | None = None

    def render(self, task: str) -> str:
        """Return the text for the model to continue."""
        if self.conversation is None:
            return f"{task.strip()}\n"
        conversation = self.conversation(f"{_INSTRUCTION}\n```\n{task.strip()}\n```\n")
        return f"{conversation}{_OPENING}\n```python\n"

    def stops(self, benchmark: str) -> tuple[str, ...]:
        """Return the strings at which an answer ends."""
        return (
            *_STOPS,
            *(_COMPLETION_STOPS[benchmark.removesuffix("plus")] if self.conversation is None else (_FENCE,)),
        )

    def answer(self, task: str, completion: str) -> str:
        """Return the program that a completion of the task makes."""
        return f"{task.strip()}\n{completion}" if self.conversation is None else completion


def make_sanitizer() -> Callable[[str, str], str]:
    """Return EvalPlus's sanitizer: a function from a text and a function's name to the code that this function needs.

    Raises:
        EvaluationError: EvalPlus is not installed.
    """
    try:
        from evalplus.sanitize import sanitize
    except ImportError as error:
        raise EvaluationError(
            f"EvalPlus is not completely installed ({error}): pip install 'dylora-moe[evaluation]', or give "
            "`no_evalplus`"
        ) from error

    def sanitize_answer(text: str, entry_point: str) -> str:
        try:
            with warnings.catch_warnings():
                # it parses each line of the text, and Python warns of invalid escapes
                warnings.simplefilter("ignore")
                return str(sanitize(text, entry_point))
        except (RecursionError, ValueError):
            # too deeply nested for the parser, or with null bytes: not a program, so judge the text itself
            return text

    return sanitize_answer
