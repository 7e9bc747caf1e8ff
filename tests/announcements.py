"""Notes what transformers and PEFT announce through their loggers, where pytest's warning filters do not look.

``warning_once`` says a thing once in a process, and a program may have turned the logger down: its calls are noted
before either counts, so that every test that uses an old name is named.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as _  # noqa: F401 - gives every logger its warning_once

TELLS = re.compile(r"deprecat|will be removed|(has|have|is|are|was|were) renamed", re.IGNORECASE)
NOT_OURS = (
    # transformers' own call, in which assisted decoding asks the assistant for tokens
    "Passing `generation_config` together with generation-related arguments",
    # what a user gives, and a test in a user's place
    "Passing `fsdp` as a string",
    "`torch_dtype` is deprecated",
)
"""Announcements of what this package does not do itself."""
LIBRARIES = ("transformers", "peft")
HERE = Path(__file__).parents[1]


class _Notes(logging.Handler):
    """The plain warnings of a library."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        _note(self.said, record.name, record.getMessage())


@contextmanager
def announcements() -> Iterator[list[str]]:
    """Collects the announcements of a block of code, each with the line of ours that led to it."""
    said: list[str] = []
    handler, once = _Notes(said), logging.Logger.warning_once

    def noted(logger: logging.Logger, *args: Any, **options: Any) -> None:
        _note(said, logger.name, str(args[0]))
        once(logger, *args, **options)

    logging.Logger.warning_once = noted
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.Logger.warning_once = once
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(handler)


def _note(said: list[str], logger: str, message: str) -> None:
    tells = TELLS.search(message) and not any(part in message for part in NOT_OURS)
    if tells and logger.partition(".")[0] in LIBRARIES:
        ours = [f for f in traceback.extract_stack() if _is_ours(Path(f.filename))]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: " if ours else ""
        if f"{line}{message}" not in said:
            said.append(f"{line}{message}")


def _is_ours(path: Path) -> bool:
    """Whether a file is the package's, wherever it is installed, or a test's."""
    return "dylo_moe" in path.parts or (path.is_relative_to(HERE / "tests") and path != Path(__file__))
