"""Checkpoints kept elsewhere: what a store of artifacts has to do, one that is a folder, and uploads while training.

An artifact is a folder of files under a name, with versions and a little metadata. Weights & Biases is the other
store (``wandb_store``); how a run goes on from an artifact is in ``fetching``.
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
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.durable import atomic_directory, sha256_of
from dylo_moe.errors import ArtifactError, CheckpointError, first_line
from dylo_moe.training import checkpoints

_LOG = logging.getLogger(__name__)
RETRY_SECONDS = 600
"""How long no checkpoint is put after one could not be: each try may have to wait for a server that is not there."""
_ENTRY_FILE = "artifact.json"
_VERSION = re.compile(r"v(\d+)")


@dataclass(frozen=True)
class ArtifactEntry:
    """What a store knows of one version of an artifact, without its files.

    Attributes:
        digest: Of all files; another artifact has another one.
        metadata: As it was put.
    """

    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)


class ArtifactStore(Protocol):
    """Where artifacts are kept. Every method raises ``ArtifactError`` where the store cannot do it."""

    def describe(self, reference: str) -> ArtifactEntry:
        """Finds a version of an artifact; fetches nothing."""

    def fetch(self, reference: str, folder: Path) -> Path:
        """Makes ``folder``, which must not exist, from an artifact whose digest is right; leaves nothing otherwise."""

    def put(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> str:
        """Keeps a folder as a new version of an artifact; returns its reference. It may go on in the background."""

    def wait(self) -> None:
        """Waits until all that was put is kept."""


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
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
    """Artifacts in a folder: ``ROOT/name/v0/files`` and what is known of it in ``ROOT/name/v0/artifact.json``.

    Args:
        root: Made by the first ``put``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(self, reference: str) -> ArtifactEntry:
        """Reads what is known of a version; ``name:v0``, or ``name:latest`` for the newest."""
        version = self._version(reference)
        try:
            entry = json.loads((version / _ENTRY_FILE).read_text())
            return ArtifactEntry(digest=entry["digest"], metadata=entry["metadata"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{version / _ENTRY_FILE} cannot be read ({first_line(error)})") from error

    def fetch(self, reference: str, folder: Path) -> Path:
        """Copies the files of a version."""
        entry, files = self.describe(reference), self._version(reference) / "files"
        with beside(folder) as target:
            shutil.copytree(files, target, dirs_exist_ok=True)
            got = digest_of(target)
            if got != entry.digest:
                raise ArtifactError(
                    f"{files} is not what was put there: its digest is {got[:12]} in the place of "
                    f"{entry.digest[:12]}; use another version"
                )
        return folder

    def put(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> str:
        """Copies a folder as the next version."""
        artifact = self.root / name
        version = artifact / f"v{max(self._numbers(artifact), default=-1) + 1}"
        with beside(version) as target:
            shutil.copytree(folder, target / "files")
            entry = {"digest": digest_of(target / "files"), "metadata": dict(metadata)}
            (target / _ENTRY_FILE).write_text(json.dumps(entry, indent=2) + "\n")
        return f"folder:{artifact}:{version.name}"

    def wait(self) -> None:
        """Nothing: a folder is kept once ``put`` returns."""

    def _version(self, reference: str) -> Path:
        name, _, version = reference.rpartition(":")
        artifact = self.root / name
        numbers = self._numbers(artifact)
        if version == "latest" and numbers:
            version = f"v{max(numbers)}"
        if version not in {f"v{number}" for number in numbers}:
            have = ", ".join(f"v{number}" for number in sorted(numbers)) or "none"
            raise ArtifactError(f"{self.root} has no artifact {reference!r} (versions of {name!r}: {have})")
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
    """Puts each checkpoint into a store, and at the end the best model. A store that fails never ends the training.

    Args:
        store: Where to.
        run_id: Ends the artifacts' names, and lets a run that goes on from one know whose it was.
    """

    def __init__(self, store: ArtifactStore, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.run_id = run_id
        self._clock = clock
        self._failed: float | None = None
        self._warned = False

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._failed is not None and self._clock() < self._failed + RETRY_SECONDS:
            return
        folder = checkpoints.folder_of(Path(args.output_dir or "."), state.global_step)
        best = state.best_model_checkpoint
        is_best = best is not None and Path(best).name == folder.name
        self._keep(folder, "checkpoint", {"step": state.global_step, "best": is_best})

    def finish(self, best_model: Path, step: int) -> None:
        """Puts the best model, and waits until everything is kept."""
        self._keep(best_model, "model", {"step": step})
        try:
            self.store.wait()
        except ArtifactError as error:
            self._warn(error, best_model.parent)

    def _keep(self, folder: Path, kind: str, metadata: dict[str, Any]) -> None:
        try:
            if kind == "checkpoint":
                checkpoints.check(folder)
            self.store.put(folder, f"{kind}-{self.run_id}", {"kind": kind, "run_id": self.run_id, **metadata})
        except (ArtifactError, CheckpointError) as error:
            self._warn(error, folder.parent)

    def _warn(self, error: Exception, folder: Path) -> None:
        self._failed = self._clock()
        if not self._warned:
            _LOG.warning("%s; the run goes on, and its checkpoints stay in %s", first_line(error), folder)
        self._warned = True
