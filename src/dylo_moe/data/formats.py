"""Row formats: how the columns of a dataset's row become prompts and responses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dylo_moe.errors import DatasetError

Row = Mapping[str, object]
"""Columns of one row of a dataset."""

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``, as the chat templates of transformers take them."""


class PromptResponse(NamedTuple):
    """One response and the prompt before it.

    Attributes:
        prompt: Messages of the conversation before the response, or a text that the response continues.
        response: Text to learn.
    """

    prompt: str | list[Message]
    response: str

    @property
    def key(self) -> str:
        """Text that decides the split of the row: the prompt, or the first message of the user."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next(message["content"] for message in self.prompt if message["role"] == "user")


RowFormat = Callable[[Row], Iterator[PromptResponse]]
"""Converts a row to prompts and responses; raises ``DatasetError`` for a row that has another format."""


@dataclass(frozen=True)
class InstructionColumns:
    """Format of rows with an instruction, optionally an input, and an answer.

    Attributes:
        instruction: Column of the instruction.
        response: Column of the answer.
        context: Column of the input, which may be empty or missing in a row.
    """

    instruction: str
    response: str
    context: str | None = None

    def __call__(self, row: Row) -> Iterator[PromptResponse]:
        """Yield the single prompt and response of a row."""
        task = _text_of(row, self.instruction).strip()
        if self.context and row.get(self.context) is not None:
            given = _text_of(row, self.context).strip()
            task = f"{task}\n\n### Input:\n{given}" if given else task
        yield PromptResponse(user_message(task), _text_of(row, self.response))


@dataclass(frozen=True)
class CompletionColumns:
    """Format of rows whose response continues the prompt; no template is applied.

    Attributes:
        prompt: Column of the prompt.
        response: Column of the response.
    """

    prompt: str = "prompt"
    response: str = "response"

    def __call__(self, row: Row) -> Iterator[PromptResponse]:
        """Yield the single prompt and response of a row."""
        yield PromptResponse(_text_of(row, self.prompt), _text_of(row, self.response))


@dataclass(frozen=True)
class TurnColumn:
    """Format of rows with a conversation in one column, as chat messages or as in ShareGPT.

    Every answer is learned, with all turns before it as its prompt.

    Attributes:
        column: Column of the turns.
    """

    column: str

    def __call__(self, row: Row) -> Iterator[PromptResponse]:
        """Yield a prompt and response for each answer."""
        turns = _required(row, self.column)
        if not isinstance(turns, list) or not turns:
            raise DatasetError(f"column {self.column!r} must be a list of turns, got {_type_name(turns)}")
        messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
        speakers = [message["role"] for message in messages if message["role"] != "system"]
        if "assistant" not in speakers or speakers[0] != "user":
            raise DatasetError(f"column {self.column!r} must have an answer after a turn of the user")
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield PromptResponse(messages[:index], message["content"])


def mbpp_row(row: Row) -> Iterator[PromptResponse]:
    """Yield the task of an MBPP row with the tests to pass, as in the MBPP paper, and its code."""
    tests = _required(row, "test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise DatasetError(f"column 'test_list' must be a list of texts, got {_type_name(tests)}")
    listed = "\n".join(tests)
    task = f"{_text_of(row, 'text').strip()}\nYour code should pass these tests:\n{listed}"
    # a model would learn the Windows line ends of the file
    yield PromptResponse(user_message(task.replace("\r\n", "\n")), _text_of(row, "code").replace("\r\n", "\n"))


FORMATS: dict[str, tuple[tuple[str, ...], RowFormat]] = {
    "chat messages": (("messages",), TurnColumn("messages")),
    "ShareGPT": (("conversations",), TurnColumn("conversations")),
    "Alpaca": (("instruction", "output"), InstructionColumns("instruction", "output", "input")),
    "instruction and response": (("instruction", "response"), InstructionColumns("instruction", "response", "input")),
    "query and answer": (("query", "answer"), InstructionColumns("query", "answer")),
    "question and answer": (("question", "answer"), InstructionColumns("question", "answer")),
    "prompt and completion": (("prompt", "completion"), CompletionColumns("prompt", "completion")),
    "prompt and response": (("prompt", "response"), CompletionColumns("prompt", "response")),
}
"""Formats of the user's own files, by title: the columns that identify each, and the format, tried in this order."""


def detect_format(row: Row) -> Iterator[PromptResponse]:
    """Return the prompts and responses of a row in the first of ``FORMATS`` whose columns it has.

    Raises:
        DatasetError: The row has the columns of no format.
    """
    for columns, read in FORMATS.values():
        if all(column in row for column in columns):
            return read(row)
    known = "; ".join(" + ".join(columns) for columns, _ in FORMATS.values())
    raise DatasetError(f"its columns are {', '.join(map(str, row)) or 'none'}, and no known format has them ({known})")


def user_message(text: str) -> list[Message]:
    """Return a conversation of one message of the user."""
    return [{"role": "user", "content": text}]


def _text_of(row: Row, column: str) -> str:
    """Return the text in a column.

    Raises:
        DatasetError: The column is missing or does not hold text.
    """
    value = _required(row, column)
    if not isinstance(value, str):
        raise DatasetError(f"column {column!r} must be text, got {_type_name(value)}")
    return value


def _required(row: Row, column: str) -> object:
    if column not in row:
        raise DatasetError(f"there is no column {column!r} (there are: {', '.join(map(str, row)) or 'none'})")
    return row[column]


_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise DatasetError(f"turn {number} must be an object with a role and a text, got {_type_name(turn)}")
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    speaker = _text_of(turn, role)
    if speaker not in _ROLES:
        raise DatasetError(f"turn {number} is by {speaker!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": _text_of(turn, content)}


def _type_name(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
