"""Folders of mixtures and adapters, given by a path or by a Hub id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dylo_moe.errors import CheckpointError, causes_of, first_line

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def is_hub_id(source: str | Path) -> bool:
    """Return whether a name can be a Hub id: ``name`` or ``user/name``, and not a path or a folder here."""
    name = str(source)
    return (
        not Path(name).exists() and not name.startswith(("/", ".", "~")) and name.count("/") <= 1 and "\\" not in name
    )


def folder_of(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    files: Sequence[str] = FILES,
    **hub: Any,
) -> Path:
    """Return a folder by its path, or a snapshot of a Hub repository by its id.

    Args:
        source: A path or a Hub id.
        revision: Commit, tag or branch on the Hub.
        subfolder: Path within the repository or folder.
        files: Patterns of the files to fetch.
        **hub: Passed to ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointError: There is no such folder, or the repository cannot be fetched.
    """
    if not is_hub_id(source):
        return Path(source) / subfolder
    name = str(source)
    if name.count("/") != 1:
        raise CheckpointError(f"there is no folder {name!r}; give a folder, or a Hub id of the form user/name")
    try:
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub)) / subfolder
    except (OSError, ValueError) as error:
        raise CheckpointError(_explain(name, revision, error)) from error


def _explain(name: str, revision: str | None, error: BaseException) -> str:
    causes = tuple(type(cause) for cause in causes_of(error))
    if any(issubclass(cause, HFValidationError) for cause in causes):
        return f"there is no folder {name!r}, and it is not a Hub id: {first_line(error)}"
    if any(issubclass(cause, RevisionNotFoundError) for cause in causes):
        return f"{name!r} has no revision {revision!r} on the Hub"
    if any(issubclass(cause, GatedRepoError | RepositoryNotFoundError) for cause in causes):
        return f"there is no folder {name!r}, and the Hub has no such repository or HF_TOKEN may not see it"
    if any(issubclass(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for cause in causes):
        return (
            f"there is no folder {name!r}; as a Hub id it is not in the local cache, and the Hub cannot be reached (or "
            "HF_HUB_OFFLINE is set)"
        )
    return f"{name!r} cannot be fetched from the Hub: {first_line(error)}"
