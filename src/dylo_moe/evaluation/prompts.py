"""How a task is put to a model, where its answer ends, and which part of the answer is judged.

Instruction, opening of the answer and stop strings are those of EvalPlus (Liu et al. 2023,
https://github.com/evalplus/evalplus), so that scores compare with published ones.
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
    """How tasks are put.

    Attributes:
        name: ``complete`` for a text to go on from; otherwise the name of the conversation's template.
        conversation: Gives an instruction its template, up to where the answer begins; None for ``complete``.
    """

    name: str = COMPLETE
    conversation: Callable[[str], str] | None = None

    def render(self, task: str) -> str:
        """The text that the model goes on from."""
        if self.conversation is None:
            return f"{task.strip()}\n"
        asked = self.conversation(f"{_INSTRUCTION}\n```\n{task.strip()}\n```\n")
        return f"{asked}{_OPENING}\n```python\n"

    def stops(self, benchmark: str) -> tuple[str, ...]:
        """Where an answer ends."""
        return (
            *_STOPS,
            *(_COMPLETION_STOPS[benchmark.removesuffix("plus")] if self.conversation is None else (_FENCE,)),
        )

    def answer(self, task: str, completion: str) -> str:
        """The program that the model wrote."""
        return f"{task.strip()}\n{completion}" if self.conversation is None else completion


def sanitiser() -> Callable[[str, str], str]:
    """EvalPlus's: from a text and the name of the wanted function to the code that this function needs.

    Raises:
        EvaluationError: It is not installed.
    """
    try:
        from evalplus.sanitize import sanitize
    except ImportError as error:
        raise EvaluationError(
            f"EvalPlus is not installed whole ({error}): pip install 'dylora-moe[evaluation]', or give --no_evalplus"
        ) from error

    def sanitised(text: str, entry_point: str) -> str:
        try:
            with warnings.catch_warnings():
                # it parses what a model wrote, line by line, and Python warns of odd escapes in that
                warnings.simplefilter("ignore")
                return str(sanitize(text, entry_point))
        except (RecursionError, ValueError):
            # nested more deeply than Python can parse, or with null bytes: no program, and judged as it stands
            return text

    return sanitised
