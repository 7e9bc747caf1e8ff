"""How a row of a dataset becomes prompts and responses, by the columns that it has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dylo_moe.errors import DatasetError

Row = Mapping[str, Any]
Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``, as transformers' chat templates take them."""


class Exchange(NamedTuple):
    """One response with what comes before it.

    Attributes:
        prompt: The turns of a conversation before the response, or a text that the response simply goes on from.
        response: What is learned.
    """

    prompt: str | list[Message]
    response: str

    @property
    def key(self) -> str:
        """What the row's split follows from: the text, or the first thing that the user says."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next(message["content"] for message in self.prompt if message["role"] == "user")


RowFormat = Callable[[Row], Iterator[Exchange]]
"""From a row to its exchanges; raises ``DatasetError`` where the row is not of this format."""


@dataclass(frozen=True)
class InstructionColumns:
    """Rows of an instruction, possibly some input, and an answer."""

    instruction: str
    response: str
    context: str | None = None

    def __call__(self, row: Row) -> Iterator[Exchange]:
        """Yields the one exchange of a row."""
        task = text_of(row, self.instruction).strip()
        given = row.get(self.context) if self.context else None
        if given is not None:
            given = text_of(row, str(self.context)).strip()
        yield Exchange(asked(f"{task}\n\n### Input:\n{given}" if given else task), text_of(row, self.response))


@dataclass(frozen=True)
class CompletionColumns:
    """Rows whose response goes on where the prompt ends; no template is put around them."""

    prompt: str = "prompt"
    response: str = "response"

    def __call__(self, row: Row) -> Iterator[Exchange]:
        """Yields the one exchange of a row."""
        yield Exchange(text_of(row, self.prompt), text_of(row, self.response))


@dataclass(frozen=True)
class TurnColumn:
    """Rows of one column with the turns of a conversation, as chat messages or as in ShareGPT.

    Every answer is learned, with all turns before it as its prompt.
    """

    column: str

    def __call__(self, row: Row) -> Iterator[Exchange]:
        """Yields an exchange for each answer."""
        turns = _required(row, self.column)
        if not isinstance(turns, list) or not turns:
            raise DatasetError(f"column {self.column!r} must be a list of turns, got {_named(turns)}")
        messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
        speakers = [message["role"] for message in messages if message["role"] != "system"]
        if "assistant" not in speakers or speakers[0] != "user":
            raise DatasetError(f"column {self.column!r} must have an answer after a turn of the user")
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield Exchange(messages[:index], message["content"])


def mbpp_row(row: Row) -> Iterator[Exchange]:
    """MBPP as in its paper: the task and the tests that its code has to pass, then the code."""
    tests = _required(row, "test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise DatasetError(f"column 'test_list' must be a list of texts, got {_named(tests)}")
    listed = "\n".join(tests)
    task = f"{text_of(row, 'text').strip()}\nYour code should pass these tests:\n{listed}"
    # the file has the line ends of another system, which a model would learn to write
    yield Exchange(asked(task.replace("\r\n", "\n")), text_of(row, "code").replace("\r\n", "\n"))


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
"""The formats of people's own files: the columns that tell each of them, tried in this order."""


def by_columns(row: Row) -> Iterator[Exchange]:
    """The exchanges of a row in whichever of ``FORMATS`` its columns are."""
    for columns, read in FORMATS.values():
        if all(column in row for column in columns):
            return read(row)
    known = "; ".join(" + ".join(columns) for columns, _ in FORMATS.values())
    raise DatasetError(f"its columns are {', '.join(map(str, row)) or 'none'}, and no known format has them ({known})")


def asked(text: str) -> list[Message]:
    """A conversation that begins with a user's request."""
    return [{"role": "user", "content": text}]


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DatasetError: There is no such column, or it holds something else.
    """
    value = _required(row, column)
    if not isinstance(value, str):
        raise DatasetError(f"column {column!r} must be text, got {_named(value)}")
    return value


def _required(row: Row, column: str) -> Any:
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


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise DatasetError(f"turn {number} must be an object with a role and a text, got {_named(turn)}")
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    speaker = text_of(turn, role)
    if speaker not in _ROLES:
        raise DatasetError(f"turn {number} is by {speaker!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": text_of(turn, content)}


def _named(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
