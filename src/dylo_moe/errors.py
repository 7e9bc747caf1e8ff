"""Every error that a user can cause or mend: one line that names the knob, what was got, and what to do.

The command line prints the message of a ``DyLoRAError`` and exits with ``EXIT_USER_ERROR``, without a traceback.
Anything else that is raised is a defect of this package, and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again to resume
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in a shell

DISK_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""What a full or protected disk says."""


class DyLoRAError(ValueError):
    """Base of all errors that the user can mend."""


class ConfigError(DyLoRAError):
    """A flag or a configuration value is wrong."""


class ModelError(DyLoRAError):
    """The base model cannot be had, or cannot carry experts."""


class ExpertError(DyLoRAError):
    """An expert is missing, named wrongly, or of a kind that cannot be routed."""


class RoutingError(DyLoRAError):
    """Routing weights or a routing mode do not fit the model."""


class DatasetError(DyLoRAError):
    """A dataset is unknown, unreachable, empty or malformed."""


class CheckpointError(DyLoRAError):
    """A checkpoint cannot be written, is not whole, or belongs to another model."""


class TrainingError(DyLoRAError):
    """A training run cannot go on with these flags."""


class ArtifactError(DyLoRAError):
    """An artifact cannot be fetched or kept, or is not what was put there."""


class EvaluationError(DyLoRAError):
    """A benchmark's data cannot be had, or its answers cannot be run safely."""


class CloudError(DyLoRAError):
    """What a cloud says of itself cannot be used, or a job cannot be sent to one."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """The first line of what a library had to say, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes_of(error: BaseException | None) -> list[BaseException]:
    """An error, and all that it was raised from or while handling."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
