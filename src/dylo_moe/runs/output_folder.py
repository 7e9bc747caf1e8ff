"""Check that results can be written before time is spent on computing them."""

import tempfile
from pathlib import Path

from dylo_moe.errors import ConfigError


def check_writable(folder: str | Path, flag: str) -> None:
    """Create a folder if it is missing, and a temporary file in it.

    Args:
        folder: The folder that a program will write to.
        flag: The flag that names the folder, for the error message.

    Raises:
        ConfigError: The folder cannot be created or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag}: {folder} cannot be written: {error.strerror}") from error
