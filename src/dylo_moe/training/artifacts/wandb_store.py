"""Weights & Biases: its store of artifacts, and runs that continue under the same id when training is resumed.

The one module that uses the client, which is optional and imported on use.
"""

import importlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol

from dylo_moe.durable import atomic_file
from dylo_moe.errors import DISK_REFUSED, ArtifactError, ConfigError, causes_of, first_line
from dylo_moe.training.artifacts.store import ArtifactRecord, artifact_directory

_RUN_FILE = "wandb_run.json"
PROJECT = "dylora-moe"
"""Project of a run if neither the caller nor ``WANDB_PROJECT`` names one."""

API_SECONDS = 30
UPLOAD_SECONDS = 600
"""Longest wait for the upload of one artifact at the end of a run."""
FINISH_SECONDS = 60
"""Longest wait for other uploads at exit; the client would wait forever for a lost server."""


class _Artifact(Protocol):
    """The part of the client's artifact that is used here."""

    entity: str
    project: str
    digest: str
    metadata: Mapping[str, object] | None

    def download(self, *, root: str, skip_cache: bool) -> str: ...

    def verify(self, *, root: str) -> None: ...

    def wait(self, *, timeout: int) -> object: ...


class WandbRun(Protocol):
    """The part of the client's run that is used here and by callers of ``start_run``."""

    id: str
    entity: str
    project: str

    def log_artifact(self, artifact: object, *, aliases: list[str]) -> _Artifact:
        """Upload an artifact in the background."""


class WandbStore:
    """Store of artifacts at Weights & Biases.

    Args:
        run: The client's run, which uploads artifacts; without one they can only be fetched.
    """

    def __init__(self, run: WandbRun | None = None) -> None:
        self._run = run
        self._uploads: list[_Artifact] = []

    def describe(self, reference: str) -> ArtifactRecord:
        """Return the server's description of a version, with its entity and project."""
        artifact = self._artifact(reference)
        owner = {"entity": artifact.entity, "project": artifact.project}
        return ArtifactRecord(digest=artifact.digest, metadata={**(artifact.metadata or {}), **owner})

    def fetch(self, reference: str, folder: Path) -> Path:
        """Download an artifact into a new folder, and verify each file against the artifact's manifest."""
        artifact = self._artifact(reference)
        with artifact_directory(folder) as target:
            with _readable_errors(f"the artifact {reference!r}"):
                artifact.download(root=str(target), skip_cache=True)
            try:
                artifact.verify(root=str(target))
            except ValueError as error:
                raise ArtifactError(
                    f"the artifact {reference!r} is not what was put there: {first_line(error)}; use another version"
                ) from error
        return folder

    def put(self, folder: Path, name: str, metadata: Mapping[str, object]) -> str:
        """Start uploading a folder in the background; return the artifact's reference."""
        assert self._run is not None, "only a run can put artifacts"
        wandb = client()
        version = f"step-{metadata['step']}" if "step" in metadata else "latest"
        with _readable_errors(f"the artifact {name!r}"):
            artifact = wandb.Artifact(name, type=str(metadata.get("kind", "model")), metadata=dict(metadata))
            artifact.add_dir(str(folder))
            aliases = ["latest", version, *(["best"] if metadata.get("best") else [])]
            self._uploads.append(self._run.log_artifact(artifact, aliases=list(dict.fromkeys(aliases))))
        return f"{self._run.entity}/{self._run.project}/{name}:{version}"

    def wait(self) -> None:
        """Wait for the uploads; an offline run keeps its artifacts on this machine."""
        if is_offline():
            return
        with _readable_errors("the upload of artifacts"):
            for artifact in self._uploads:
                artifact.wait(timeout=UPLOAD_SECONDS)

    def _artifact(self, reference: str) -> _Artifact:
        wandb = client()
        if is_offline():
            raise ArtifactError(
                f"the artifact {reference!r} needs the network, and WANDB_MODE={os.environ['WANDB_MODE']} keeps W&B "
                "off it; unset WANDB_MODE, or resume from a folder with `resume_from_checkpoint`"
            )
        with _readable_errors(f"the artifact {reference!r}"):
            artifact: _Artifact = wandb.Api(timeout=API_SECONDS).artifact(reference)
        return artifact


def client() -> ModuleType:
    """Return the module ``wandb``.

    Raises:
        ConfigError: The client is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"Weights & Biases needs its client ({first_line(error)}); run: pip install 'dylora-moe[wandb]'"
        ) from error


def is_offline() -> bool:
    """Return whether ``WANDB_MODE`` keeps W&B off the network."""
    return os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled")


def check_access() -> None:
    """Check that W&B can be reached and accepts the key; cheap, so call it before anything expensive.

    Raises:
        ConfigError: The client is not installed.
        ArtifactError: The key is missing or wrong, or there is no network.
    """
    wandb = client()
    if is_offline():
        return
    with _readable_errors("the run"):
        wandb.Api(timeout=API_SECONDS)  # asks the server for the key's owner


def start_run(
    output_dir: Path, *, project: str | None, entity: str | None, name: str | None, continues: bool
) -> WandbRun:
    """Start a W&B run or continue the one of ``output_dir``, for the Trainer's W&B callback; return the client's run.

    Args:
        output_dir: Folder of the run's id and of the client's own files.
        project: W&B project; by default that of the continued run, ``$WANDB_PROJECT`` or ``PROJECT``.
        entity: User or team; by default that of the continued run, or the key's owner.
        name: Display name of the run; by default that of the continued run, or one that W&B invents.
        continues: Whether the training is resumed from a checkpoint.

    Raises:
        ConfigError: The client is not installed.
        ArtifactError: W&B cannot be used; the message says why.
    """
    wandb = client()
    previous = _stored_run(output_dir) if continues else {}
    entry = {
        "id": os.environ.get("WANDB_RUN_ID") or previous.get("id") or secrets.token_hex(4),
        "project": project or previous.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT,
        "entity": entity or previous.get("entity"),
        "name": name or previous.get("name"),
    }
    _store_run(output_dir, entry)
    with _readable_errors("the run"):
        # an offline run cannot be resumed; `wandb sync` joins its parts by their id
        settings = wandb.Settings(init_timeout=API_SECONDS, finish_timeout=FINISH_SECONDS)
        resume = None if is_offline() else "allow"
        run: WandbRun = wandb.init(**entry, dir=str(output_dir), resume=resume, settings=settings)
    return run


def adopt_run(output_dir: Path, metadata: Mapping[str, object]) -> None:
    """Make the next run in ``output_dir`` continue the run that put an artifact, or none if that is not known."""
    if "run_id" in metadata:
        _store_run(output_dir, {"id": metadata["run_id"]} | {key: metadata.get(key) for key in ("project", "entity")})
    else:
        (output_dir / _RUN_FILE).unlink(missing_ok=True)


def _stored_run(output_dir: Path) -> dict[str, str | None]:
    """Return id, project, entity and name of the run of a folder; empty if there is none or it cannot be read."""
    try:
        found = json.loads((output_dir / _RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store_run(output_dir: Path, entry: Mapping[str, object]) -> None:
    with atomic_file(output_dir / _RUN_FILE) as file:
        file.write(json.dumps(entry, indent=2) + "\n")


_WRONG_KEY = (
    "W&B has no key, or does not accept it: set WANDB_API_KEY to a key of your account, or run `wandb login`; "
    "WANDB_MODE=offline does without"
)
# the client raises an AuthenticationError also if no server answered: match the text instead, in this order
_UNREACHABLE = (
    "timed out",
    "deadline exceeded",
    "did not respond",
    "connection refused",
    "no such host",
    "dial tcp",
)
_NO_ACCESS = ("api key", "api_key", "401", "unauthorized", "not logged in", "wandb login", "verify credentials")
_MISSING = ("not found", "404", "does not exist", "could not find", "no such artifact", "403", "permission")


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turn errors of the client within the block into one-line ``ArtifactError``s; disk errors pass unchanged."""
    wandb = client()
    connection = importlib.import_module("wandb.sdk.lib.service.service_connection")
    try:
        yield
    except (wandb.errors.Error, connection.WandbApiFailedError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_REFUSED:
            raise
        raise ArtifactError(_explain(what, error)) from error


def _explain(what: str, error: BaseException) -> str:
    text = " ".join(str(cause) for cause in causes_of(error)).lower()
    if any(word in text for word in _UNREACHABLE):
        return (
            f"W&B cannot be reached for {what} ({first_line(error)}); connect, or set WANDB_MODE=offline, which keeps "
            "metrics and uploads on this machine until `wandb sync`, and fetches nothing"
        )
    if any(word in text for word in _NO_ACCESS):
        return _WRONG_KEY
    if any(word in text for word in _MISSING):
        return f"W&B did not find {what}, or this key may not see it ({first_line(error)}); check the name and the key"
    return f"W&B refuses {what} ({first_line(error)})"
