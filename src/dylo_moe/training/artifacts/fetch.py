"""Fetching checkpoints and mixtures that are kept as artifacts; only verified ones get their final name."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from dylo_moe.core import DESCRIPTION_FILE
from dylo_moe.durable import atomic_file, sync
from dylo_moe.errors import ArtifactError, CheckpointError, ConfigError, first_line
from dylo_moe.training.artifacts import wandb_store
from dylo_moe.training.artifacts.store import ArtifactStore, FolderStore
from dylo_moe.training.checkpointing import checkpoints

FOLDER = "folder:"
_RECORD = "fetched.json"
_WANDB_REFERENCE = re.compile(r"([\w.-]+/){1,2}[\w.-]+:[\w.-]+")
_FOLDER_REFERENCE = re.compile(r"(?P<root>.+)/(?P<artifact>[\w.-]+:(v\d+|latest))")


def store_of(reference: str, parameter: str = "wandb_checkpoint_artifact") -> tuple[ArtifactStore, str]:
    """Return the store that a reference points to, and the reference in the form which that store takes.

    Args:
        reference: ``entity/project/artifact:version`` of Weights & Biases, or ``folder:PATH/artifact:version``.
        parameter: Name of the parameter, for the error message.

    Raises:
        ConfigError: The reference is malformed.
    """
    if reference.startswith(FOLDER):
        match = _FOLDER_REFERENCE.fullmatch(reference.removeprefix(FOLDER))
        if match:
            return FolderStore(Path(match["root"])), match["artifact"]
    elif _WANDB_REFERENCE.fullmatch(reference):
        return wandb_store.WandbStore(), reference
    raise ConfigError(
        f"`{parameter}` must be like user/project/artifact:v0, or {FOLDER}PATH/artifact:v0, got {reference!r}"
    )


def was_resumed_from(reference: str, output: Path) -> bool:
    """Return whether a folder holds complete checkpoints of a run that began with this artifact.

    The same command, started again after an interruption, then resumes from the newest of them and loses nothing.
    """
    return _record(output) == reference and checkpoints.newest_whole(output)[0] is not None


def fetch_checkpoint(reference: str, output: Path, replacing: Sequence[Path] = (), *, in_place: bool = False) -> Path:
    """Fetch the checkpoint of an artifact as ``checkpoint-STEP`` of a folder; return that path.

    The next run in the folder continues under the id of the run that wrote the checkpoint.

    Args:
        reference: As for ``store_of``.
        output: The run's folder.
        replacing: Checkpoints of an earlier run, removed once the fetched one is verified.
        in_place: Whether to rename no folder, for object storage that cannot.

    Raises:
        ConfigError: The reference is malformed.
        ArtifactError: The artifact cannot be fetched, is not a checkpoint, or is not what was put there.
        CheckpointError: The files do not match the checkpoint's own manifest.
    """
    store, name = store_of(reference)
    entry = store.describe(name)
    if entry.metadata.get("kind", "checkpoint") != "checkpoint":
        raise ArtifactError(f"the artifact {reference!r} is a {entry.metadata['kind']}; name a checkpoint's")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=None if in_place else output) as scratch:
        folder = store.fetch(name, Path(scratch) / "checkpoint")
        target = checkpoints.folder_of(output, _checked_step(folder, reference))
        for old in replacing:
            checkpoints.remove(old)
        wandb_store.adopt_run(output, entry.metadata)
        with atomic_file(output / _RECORD) as record:
            record.write(json.dumps({"reference": reference}) + "\n")
        if in_place:
            (folder / checkpoints.MANIFEST).unlink()  # verified above; `commit` writes a new one
            shutil.copytree(folder, checkpoints.begin_write(target, in_place=True), dirs_exist_ok=True)
            checkpoints.commit(target, in_place=True)
        else:
            folder.rename(target)
    sync(output)
    return target


def fetch_mixture(reference: str, root: Path) -> Path:
    """Return the folder of a mixture that is an artifact: a model or a checkpoint; fetch it once for each digest.

    Args:
        reference: As for ``store_of``.
        root: Folder of fetched artifacts.

    Raises:
        ConfigError: The reference is malformed.
        ArtifactError: The artifact cannot be fetched, is not a mixture, or is not what was put there.
    """
    store, name = store_of(reference, "wandb_artifact")
    folder = root / hashlib.sha256(store.describe(name).digest.encode()).hexdigest()[:16]
    if not folder.exists():
        store.fetch(name, folder)
    if not (folder / DESCRIPTION_FILE).is_file():
        raise ArtifactError(
            f"the artifact {reference!r} is not a mixture: it has no {DESCRIPTION_FILE}; name a model's"
        )
    return folder


def _checked_step(folder: Path, reference: str) -> int:
    """Return the step of a fetched checkpoint, once it is verified."""
    if not (folder / checkpoints.MANIFEST).is_file() or not (folder / TRAINER_STATE_NAME).is_file():
        raise ArtifactError(
            f"the artifact {reference!r} is not a training checkpoint; name one that training put there"
        )
    fault = checkpoints.find_corruption(folder)
    if fault is not None:
        raise CheckpointError(f"the checkpoint of the artifact {reference!r} is damaged: {fault}; use another version")
    try:
        return int(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TRAINER_STATE_NAME} cannot be read ({first_line(error)})") from error


def _record(output: Path) -> str | None:
    """Return the artifact that the run of a folder began with; None if there is none or it cannot be read."""
    try:
        reference: str = json.loads((output / _RECORD).read_text())["reference"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reference
