"""The errors that a user can cause or fix: one line that names the parameter, what was got, and what to do.

The command line prints the message of a ``DyLoRAError`` and exits with ``EXIT_USER_ERROR``, without a traceback. In
errors and in logged warnings it replaces each parameter in backquotes by its flag. Any other exception is a defect of
this package, and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again to resume
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in a shell

DISK_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""Error numbers of a full or protected disk."""


class DyLoRAError(ValueError):
    """Base class of all errors that the user can fix."""


class ConfigError(DyLoRAError):
    """A flag or a configuration value is wrong."""


class ModelError(DyLoRAError):
    """The base model cannot be loaded, or cannot carry experts."""


class ExpertError(DyLoRAError):
    """An expert is missing, has a wrong name, or is of a kind that cannot be routed."""


class RoutingError(DyLoRAError):
    """Routing weights or a routing mode do not fit the model."""


class DatasetError(DyLoRAError):
    """A dataset is unknown, unreachable, empty or malformed."""


class CheckpointError(DyLoRAError):
    """A checkpoint cannot be written, is incomplete, or belongs to another model."""


class TrainingError(DyLoRAError):
    """A training run cannot continue with these flags."""


class ArtifactError(DyLoRAError):
    """An artifact cannot be fetched or stored, or differs from the one that was stored."""


class EvaluationError(DyLoRAError):
    """The data of a benchmark cannot be read, or its answers cannot be run safely."""


class CloudError(DyLoRAError):
    """The settings of a cloud machine cannot be used, or a job cannot be sent to a cloud."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes_of(error: BaseException | None) -> list[BaseException]:
    """Return an error and the chain of errors behind it, by ``raise ... from`` or raised while handling one."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
