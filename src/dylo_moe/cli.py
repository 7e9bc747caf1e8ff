"""The command ``dylora-moe``, and the one place where errors become exit codes and warnings become lines."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from typing_extensions import override

from dylo_moe.errors import DISK_REFUSED, EXIT_INTERRUPTED, EXIT_USER_ERROR, DyLoRAError, did_you_mean

PROGRAMS = {
    "train": "train a mixture of experts on a frozen base model",
    "acquire": "learn skills one after another, each with an expert of its own",
    "compose": "make one mixture of PEFT adapters that exist, routed by a few examples of each",
    "experts": "show a mixture's experts; rename, freeze, remove, merge, import or export them",
    "benchmark": "score a mixture or a base model on HumanEval(+) and MBPP(+)",
    "generate": "generate text with a trained mixture",
    "submit": "train on Vertex AI, on spot machines",
    "entrypoint": "train or benchmark in a container, with the settings of the platform that it runs on",
    "datasets": "list the datasets, or show what is in some",
}


class _Warnings(logging.Handler):
    """Log handler that writes each warning of the library as one line, above progress bars, for one program."""

    def __init__(self, program: str) -> None:
        super().__init__(logging.WARNING)
        self.program = program

    @override
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        message = _in_words_of_flags(record.getMessage(), self.program)
        tqdm.write(f"{record.levelname.lower()}: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dylora-moe PROGRAM ...`` and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10} {what}" for name, what in PROGRAMS.items())
        sys.stdout.write(f"usage: dylora-moe PROGRAM [--flag value ...]\n\n{rows}\n\nPROGRAM --help shows its flags.\n")
        return 0 if arguments else EXIT_USER_ERROR
    program, *rest = arguments
    if program not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        return _fail(f"there is no program {program!r}{did_you_mean(program, PROGRAMS)} (there are: {known})")
    return run(program, rest, f"dylora-moe {program}")


def run(program: str, arguments: Sequence[str] | None = None, called_as: str | None = None) -> int:
    """Run one program and return its exit code; errors of a user and warnings become lines on standard error.

    Args:
        program: Its name, one of ``PROGRAMS``.
        arguments: Its command line; that of this process if not given.
        called_as: Its name in messages; the name of the running script if not given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # peft reads a property that transformers has renamed; users cannot change that
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logger, shown = logging.getLogger("dylo_moe"), _Warnings(program)
    logger.addHandler(shown)
    try:
        # a late import: --help and a mistyped program should not wait for torch
        module = importlib.import_module(f"dylo_moe.commands.{program}")
        code: int = module.main(arguments, called_as or os.path.basename(sys.argv[0]))
        return code
    except DyLoRAError as error:
        return _fail(_in_words_of_flags(str(error), program))
    except RuntimeError:
        # another process already reported its error, and this one failed while waiting for it
        if _several() and _processes().another_failed():
            return EXIT_USER_ERROR
        raise
    except OSError as error:
        if error.errno not in DISK_REFUSED:
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while writing'}; free space, or write elsewhere")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        logger.removeHandler(shown)


def _in_words_of_flags(message: str, program: str) -> str:
    """Return a message of the library as one line that names flags, as the user gave them, for parameters."""
    from dylo_moe.config import COMMANDS, with_flags

    return with_flags(" ".join(message.split()), COMMANDS[program])


def _fail(message: str) -> int:
    if not _several() or _processes().first_to_fail():
        sys.stderr.write(f"error: {message}\n")
    return EXIT_USER_ERROR


def _several() -> bool:
    """Return whether this is one of several processes that run the same program."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _processes() -> ModuleType:
    return importlib.import_module("dylo_moe.training.distributed")
