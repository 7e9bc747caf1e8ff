"""Weights & Biases: the store of artifacts, and the run that a training continues under its id after it was stopped.

This is the one place that knows the client. It is imported when it is asked for: the package does without it.
"""

import importlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dylo_moe.durable import atomic_file
from dylo_moe.errors import DISK_REFUSED, ArtifactError, ConfigError, causes_of, first_line
from dylo_moe.training.artifacts import ArtifactEntry, beside

RUN_FILE = "wandb_run.json"
PROJECT = "dylora-moe"
"""Where runs go if neither a flag nor ``WANDB_PROJECT`` says."""

API_SECONDS = 30
UPLOAD_SECONDS = 600
"""How long the end of a run waits for its artifacts."""
FINISH_SECONDS = 60
"""How long the process waits for the rest when it ends; the client would wait for a lost server for ever."""


class WandbStore:
    """Artifacts of Weights & Biases.

    Args:
        run: Puts artifacts; without one they can only be fetched.
    """

    def __init__(self, run: Any = None) -> None:
        self._run = run
        self._sent: list[Any] = []

    def describe(self, reference: str) -> ArtifactEntry:
        """Asks the server."""
        artifact = self._artifact(reference)
        place = {"entity": artifact.entity, "project": artifact.project}
        return ArtifactEntry(digest=artifact.digest, metadata={**(artifact.metadata or {}), **place})

    def fetch(self, reference: str, folder: Path) -> Path:
        """Downloads an artifact; its files have to be those of its manifest, each by its digest."""
        artifact = self._artifact(reference)
        with beside(folder) as target:
            with _readable_errors(f"the artifact {reference!r}"):
                artifact.download(root=str(target), skip_cache=True)
            try:
                artifact.verify(root=str(target))
            except ValueError as error:
                raise ArtifactError(
                    f"the artifact {reference!r} is not what was put there: {first_line(error)}; use another version"
                ) from error
        return folder

    def put(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> str:
        """Hands a folder to the client, which uploads it in the background."""
        assert self._run is not None, "only a run can put artifacts"
        wandb = client()
        version = f"step-{metadata['step']}" if "step" in metadata else "latest"
        with _readable_errors(f"the artifact {name!r}"):
            artifact = wandb.Artifact(name, type=str(metadata.get("kind", "model")), metadata=dict(metadata))
            artifact.add_dir(str(folder))
            aliases = ["latest", version, *(["best"] if metadata.get("best") else [])]
            self._sent.append(self._run.log_artifact(artifact, aliases=list(dict.fromkeys(aliases))))
        return f"{self._run.entity}/{self._run.project}/{name}:{version}"

    def wait(self) -> None:
        """Waits for the uploads; those of an offline run stay on this machine."""
        if is_offline():
            return
        with _readable_errors("the upload of artifacts"):
            for artifact in self._sent:
                artifact.wait(timeout=UPLOAD_SECONDS)

    def _artifact(self, reference: str) -> Any:
        wandb = client()
        if is_offline():
            raise ArtifactError(
                f"the artifact {reference!r} needs the network, and WANDB_MODE={os.environ['WANDB_MODE']} keeps W&B "
                "off it; unset WANDB_MODE, or go on from a folder with --resume_from_checkpoint"
            )
        with _readable_errors(f"the artifact {reference!r}"):
            return wandb.Api(timeout=API_SECONDS).artifact(reference)


def client() -> ModuleType:
    """The module ``wandb``.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"the --wandb_... flags need the W&B client ({first_line(error)}); run: pip install 'dylora-moe[wandb]'"
        ) from error


def is_offline() -> bool:
    """Whether ``WANDB_MODE`` keeps W&B off the network."""
    return os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled")


def check_access() -> None:
    """Makes sure, before anything heavy, that W&B can be reached and takes the key.

    Raises:
        ConfigError: The client is not installed.
        ArtifactError: There is no key, a wrong one, or no network.
    """
    wandb = client()
    if is_offline():
        return
    with _readable_errors("the run"):
        wandb.Api(timeout=API_SECONDS)  # asks the server who the key is of


def start_run(output_dir: Path, *, project: str | None, entity: str | None, name: str | None, continues: bool) -> Any:
    """Starts a W&B run, or goes on with the one of ``output_dir``; the Trainer's W&B callback logs to it.

    Args:
        output_dir: Keeps the run's id, and the client's own files.
        project: W&B project; else the one of the run before, ``$WANDB_PROJECT`` or ``PROJECT``.
        entity: User or team; the key's own by default.
        name: Shown for the run; W&B invents one by default.
        continues: Whether the training goes on from a checkpoint.

    Raises:
        ConfigError: The client is not installed.
        ArtifactError: W&B cannot be had.
    """
    wandb = client()
    before = _stored_run(output_dir) if continues else {}
    entry = {
        "id": os.environ.get("WANDB_RUN_ID") or before.get("id") or secrets.token_hex(4),
        "project": project or before.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT,
        "entity": entity or before.get("entity"),
        "name": name or before.get("name"),
    }
    _store_run(output_dir, entry)
    with _readable_errors("the run"):
        # an offline run cannot be taken up again; `wandb sync` joins its parts by their id
        settings = wandb.Settings(init_timeout=API_SECONDS, finish_timeout=FINISH_SECONDS)
        return wandb.init(**entry, dir=str(output_dir), resume=None if is_offline() else "allow", settings=settings)


def adopt_run(output_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Lets the next run in ``output_dir`` go on as the run that put an artifact; where that is not known, as none."""
    if "run_id" in metadata:
        _store_run(output_dir, {"id": metadata["run_id"]} | {key: metadata.get(key) for key in ("project", "entity")})
    else:
        (output_dir / RUN_FILE).unlink(missing_ok=True)


def _stored_run(output_dir: Path) -> dict[str, str | None]:
    """The run of a folder; empty where there is none, or no whole one."""
    try:
        found = json.loads((output_dir / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store_run(output_dir: Path, entry: Mapping[str, str | None]) -> None:
    with atomic_file(output_dir / RUN_FILE) as file:
        file.write(json.dumps(entry, indent=2) + "\n")


_WRONG_KEY = (
    "W&B has no key, or does not take it: set WANDB_API_KEY to a key of your account, or run `wandb login`; "
    "WANDB_MODE=offline goes on without"
)
# the client raises an AuthenticationError also where nobody answered: what was said decides, and in this order
_SAYS_UNREACHABLE = (
    "timed out",
    "deadline exceeded",
    "did not respond",
    "connection refused",
    "no such host",
    "dial tcp",
)
_SAYS_KEY = ("api key", "api_key", "401", "unauthorized", "not logged in", "wandb login", "verify credentials")
_SAYS_MISSING = ("not found", "404", "does not exist", "could not find", "no such artifact", "403", "permission")


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turns what the client raises into one line; what the disk refuses is not its business."""
    wandb = client()
    connection = importlib.import_module("wandb.sdk.lib.service.service_connection")
    try:
        yield
    except (wandb.errors.Error, connection.WandbApiFailedError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_REFUSED:
            raise
        raise ArtifactError(_explain(what, error)) from error


def _explain(what: str, error: BaseException) -> str:
    said = " ".join(str(cause) for cause in causes_of(error)).lower()
    if any(word in said for word in _SAYS_UNREACHABLE):
        return (
            f"W&B cannot be reached for {what} ({first_line(error)}); connect, or set WANDB_MODE=offline, which keeps "
            "metrics and uploads on this machine until `wandb sync`, and fetches nothing"
        )
    if any(word in said for word in _SAYS_KEY):
        return _WRONG_KEY
    if any(word in said for word in _SAYS_MISSING):
        return f"W&B has no such thing, or this key may not see it: {what} ({first_line(error)})"
    return f"W&B refuses {what} ({first_line(error)})"
