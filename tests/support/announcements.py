"""Collect the deprecations that transformers and PEFT log, which pytest's warning filters do not see.

``warning_once`` logs a message once per process, and a program may have raised the level of the logger. Its calls are
therefore recorded before both filters, so that every test that uses a deprecated name is found.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as _  # noqa: F401 - gives every logger its warning_once

DEPRECATION = re.compile(r"deprecat|will be removed|(has|have|is|are|was|were) renamed", re.IGNORECASE)
NOT_OURS = (
    # transformers' own call, in which assisted decoding asks the assistant for tokens
    "Passing `generation_config` together with generation-related arguments",
    # arguments that users pass, and tests as well
    "Passing `fsdp` as a string",
    "`torch_dtype` is deprecated",
)
"""Messages about code that is not in this package."""
LIBRARIES = ("transformers", "peft")
HERE = Path(__file__).parents[2]


class _Notes(logging.Handler):
    """A handler of the plain warnings of a library."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        _note(self.messages, record.name, record.getMessage())


@contextmanager
def announcements() -> Iterator[list[str]]:
    """Collect the deprecations of a block of code, each with the line of this repository that caused it."""
    messages: list[str] = []
    handler, original = _Notes(messages), logging.Logger.warning_once

    def warning_once(logger: logging.Logger, *args: object, **options: object) -> None:
        _note(messages, logger.name, str(args[0]))
        original(logger, *args, **options)

    logging.Logger.warning_once = warning_once
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.Logger.warning_once = original
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(handler)


def _note(messages: list[str], logger: str, message: str) -> None:
    deprecation = DEPRECATION.search(message) and not any(part in message for part in NOT_OURS)
    if deprecation and logger.partition(".")[0] in LIBRARIES:
        ours = [f for f in traceback.extract_stack() if _is_ours(Path(f.filename))]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: " if ours else ""
        if f"{line}{message}" not in messages:
            messages.append(f"{line}{message}")


def _is_ours(path: Path) -> bool:
    """Return whether a file belongs to the package, wherever it is installed, or to the tests."""
    return "dylo_moe" in path.parts or (path.is_relative_to(HERE / "tests") and path != Path(__file__))
