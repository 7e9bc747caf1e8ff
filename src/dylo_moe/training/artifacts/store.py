"""Stores of artifacts: their interface, a store in a folder, and the upload of checkpoints while training.

An artifact is a named folder of files, with versions and a little metadata. ``wandb_store`` is the store at Weights &
Biases; ``fetching`` resumes a run from an artifact.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.durable import atomic_directory, sha256_of
from dylo_moe.errors import ArtifactError, CheckpointError, first_line
from dylo_moe.training.checkpointing import checkpoints

_LOG = logging.getLogger(__name__)
RETRY_SECONDS = 600
"""Pause after a failed upload, in seconds: each attempt may have to wait for a server that does not answer."""
_ENTRY_FILE = "artifact.json"
_VERSION = re.compile(r"v(\d+)")


@dataclass(frozen=True)
class ArtifactRecord:
    """Description of one version of an artifact, without its files.

    Attributes:
        digest: Digest of all files; it differs between artifacts of different content.
        metadata: Metadata that was stored with it.
    """

    digest: str
    metadata: dict[str, object] = field(default_factory=dict)


class ArtifactStore(Protocol):
    """Store of artifacts; every method raises ``ArtifactError`` if the store fails."""

    def describe(self, reference: str) -> ArtifactRecord:
        """Return the description of a version, ``name:version``, without fetching it."""

    def fetch(self, reference: str, folder: Path) -> Path:
        """Fetch an artifact into ``folder``, which must not exist, and verify its digest; on failure leave nothing."""

    def put(self, folder: Path, name: str, metadata: Mapping[str, object]) -> str:
        """Store a folder as a new version of an artifact, perhaps in the background; return its reference."""

    def wait(self) -> None:
        """Wait until everything that was put is stored."""


@contextmanager
def artifact_directory(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder``, which must not exist, at the end of the block.

    Raises:
        ArtifactError: The file system refused.
    """
    try:
        with atomic_directory(folder) as target:
            yield target
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error


class FolderStore:
    """Store in a folder: files in ``ROOT/name/v0/files``, digest and metadata in ``ROOT/name/v0/artifact.json``.

    Args:
        root: The folder; the first ``put`` makes it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(self, reference: str) -> ArtifactRecord:
        """Return the description of a version, ``name:v0``, or of the newest, ``name:latest``."""
        version = self._version(reference)
        try:
            entry = json.loads((version / _ENTRY_FILE).read_text())
            return ArtifactRecord(digest=entry["digest"], metadata=entry["metadata"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{version / _ENTRY_FILE} cannot be read ({first_line(error)})") from error

    def fetch(self, reference: str, folder: Path) -> Path:
        """Copy the files of a version into a new folder, and verify their digest."""
        entry, files = self.describe(reference), self._version(reference) / "files"
        with artifact_directory(folder) as target:
            shutil.copytree(files, target, dirs_exist_ok=True)
            got = digest_of(target)
            if got != entry.digest:
                raise ArtifactError(
                    f"{files} is not what was put there: its digest is {got[:12]} instead of {entry.digest[:12]}; "
                    "use another version"
                )
        return folder

    def put(self, folder: Path, name: str, metadata: Mapping[str, object]) -> str:
        """Copy a folder as the next version; return ``folder:ROOT/name:version``."""
        artifact = self.root / name
        version = artifact / f"v{max(self._numbers(artifact), default=-1) + 1}"
        with artifact_directory(version) as target:
            shutil.copytree(folder, target / "files")
            entry = {"digest": digest_of(target / "files"), "metadata": dict(metadata)}
            (target / _ENTRY_FILE).write_text(json.dumps(entry, indent=2) + "\n")
        return f"folder:{artifact}:{version.name}"

    def wait(self) -> None:
        """Do nothing: a folder is stored when ``put`` returns."""

    def _version(self, reference: str) -> Path:
        name, _, version = reference.rpartition(":")
        artifact = self.root / name
        numbers = self._numbers(artifact)
        if version == "latest" and numbers:
            version = f"v{max(numbers)}"
        if version not in {f"v{number}" for number in numbers}:
            known = ", ".join(f"v{number}" for number in sorted(numbers)) or "none"
            raise ArtifactError(f"{self.root} has no artifact {reference!r} (versions of {name!r}: {known})")
        return artifact / version

    @staticmethod
    def _numbers(artifact: Path) -> list[int]:
        found = artifact.iterdir() if artifact.is_dir() else []
        return [int(match[1]) for path in found if (match := _VERSION.fullmatch(path.name))]


def digest_of(folder: Path) -> str:
    """Return one SHA-256 of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


class ArtifactCallback(TrainerCallback):
    """Callback that stores each checkpoint, and at the end the best model, as artifacts.

    A store that fails causes one warning and never ends the training.

    Args:
        store: The store.
        run_id: Id of the run; the artifacts' names end with it, and a run resumed from one of them continues under it.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, store: ArtifactStore, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.run_id = run_id
        self._clock = clock
        self._failed_at: float | None = None
        self._warned = False

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if not state.is_world_process_zero:
            return
        if self._failed_at is not None and self._clock() < self._failed_at + RETRY_SECONDS:
            return
        folder = checkpoints.folder_of(Path(args.output_dir or "."), state.global_step)
        best = state.best_model_checkpoint
        is_best = best is not None and Path(best).name == folder.name
        self._put(folder, "checkpoint", {"step": state.global_step, "best": is_best})

    def finish(self, best_model: Path, step: int) -> None:
        """Store the best model, and wait until everything is stored."""
        self._put(best_model, "model", {"step": step})
        try:
            self.store.wait()
        except ArtifactError as error:
            self._warn(error, best_model.parent)

    def _put(self, folder: Path, kind: str, metadata: dict[str, object]) -> None:
        try:
            if kind == "checkpoint":
                checkpoints.check(folder)
            self.store.put(folder, f"{kind}-{self.run_id}", {"kind": kind, "run_id": self.run_id, **metadata})
        except (ArtifactError, CheckpointError) as error:
            self._warn(error, folder.parent)

    def _warn(self, error: Exception, folder: Path) -> None:
        self._failed_at = self._clock()
        if not self._warned:
            _LOG.warning("%s; the run continues, and its checkpoints stay in %s", first_line(error), folder)
        self._warned = True
