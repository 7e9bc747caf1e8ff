"""Training checkpoints that cannot be lost: written beside, listed with digests, and only then given their name.

A checkpoint is whole if it has a manifest and every file of it has the size and the SHA-256 that the manifest says.
The manifest is written last. So a reader tells a whole checkpoint from a torn one wherever a run was killed, also on
object storage, where renaming a folder is not one step.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylo_moe.core.checkpoint import sync
from dylo_moe.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
_NAME = re.compile(rf"{PREFIX}(\d+)")
_PARTIAL = ".partial-"
"""Begins the name of a folder that is being written or removed; no reader looks at it."""


def folder_of(output_dir: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return output_dir / f"{PREFIX}{step}"


def begin(folder: Path) -> Path:
    """An empty folder beside a checkpoint, to write it into; leftovers of runs that were killed are removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    partial = partial_of(folder)
    partial.mkdir()
    return partial


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written, the same for every process."""
    return folder.with_name(f"{_PARTIAL}{folder.name}")


def finish(folder: Path) -> None:
    """Makes what was written beside into the checkpoint: synced, listed, synced again, and renamed."""
    partial = partial_of(folder)
    files = {str(path.relative_to(partial)): _entry(path) for path in _files(partial)}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    sync(manifest)
    for inner in [path for path in partial.rglob("*") if path.is_dir()]:
        sync(inner)
    sync(partial)
    if folder.exists():  # of the same step, before its evaluation; killed here, `recover` finds the new one
        remove(folder)
    partial.rename(folder)
    sync(folder.parent)


def recover(output_dir: Path) -> None:
    """Gives checkpoints their name that are whole, but whose writer was killed before it could."""
    for partial in output_dir.glob(f"{_PARTIAL}{PREFIX}*"):
        folder = output_dir / partial.name.removeprefix(_PARTIAL)
        if not folder.exists() and problem(partial) is None:
            partial.rename(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint; killed in between, it leaves no half of one under its name."""
    gone = folder.with_name(f"{_PARTIAL}removed-{folder.name}")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    shutil.rmtree(gone)


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Removes the oldest checkpoints until ``limit`` are left; never the newest one, nor ``keep``."""
    checkpoints = newest_first(output_dir)
    spare = [folder for folder in checkpoints[1:] if keep is None or folder.name != keep.name]
    too_many = len(checkpoints) - max(1, limit or len(checkpoints))
    for folder in spare[::-1][: max(0, too_many)]:
        remove(folder)


def newest_first(output_dir: Path) -> list[Path]:
    """All checkpoint folders by step, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def newest_whole(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and the newer ones that are not, with what is wrong with each."""
    skipped: list[tuple[Path, str]] = []
    for folder in newest_first(output_dir):
        wrong = problem(folder)
        if wrong is None:
            return folder, skipped
        skipped.append((folder, wrong))
    return None, skipped


def check(folder: Path) -> None:
    """Makes sure that a checkpoint is whole.

    Raises:
        CheckpointError: It is not; the message says which file is at fault.
    """
    wrong = problem(folder)
    if wrong is not None:
        raise CheckpointError(f"the checkpoint {folder} cannot be resumed from: {wrong}; name an earlier one")


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or nothing."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes in the place of {entry['bytes']:,}"
            if _digest(path) != entry["sha256"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or a file of it cannot be read ({first_line(error)})"
    return None


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
