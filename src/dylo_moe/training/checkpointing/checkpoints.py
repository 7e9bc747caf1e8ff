"""Atomic training checkpoints: written, listed in a manifest with digests, and only then given their name.

A checkpoint is complete if it has a manifest and every file has the size and the SHA-256 that the manifest lists. The
manifest is written last, so a reader recognizes an incomplete checkpoint wherever a run was killed.

A checkpoint is written under another name and renamed. Object storage cannot rename a folder in one step, or at all:
there it is written in place, and an empty mark file next to it says that it is not finished.
"""

import json
import re
import shutil
from pathlib import Path

from dylo_moe.durable import sha256_of, sync, unfinished_mark
from dylo_moe.errors import DISK_REFUSED, CheckpointError, first_line

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
_NAME = re.compile(rf"{PREFIX}(\d+)")
_PARTIAL = ".partial-"
"""Prefix of a folder that is being written; readers ignore it."""


def folder_of(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return output_dir / f"{PREFIX}{step}"


def staging_path(folder: Path, *, in_place: bool = False) -> Path:
    """Return the folder in which a checkpoint is written, the same for every process."""
    return folder if in_place else folder.with_name(f"{_PARTIAL}{folder.name}")


def begin_write(folder: Path, *, in_place: bool = False) -> Path:
    """Return an empty folder to write a checkpoint into, after removing the leftovers of killed runs.

    Args:
        folder: The checkpoint.
        in_place: Whether to write it under its own name. A checkpoint of the same step, saved before its evaluation, is
            then removed first: a run killed while it is rewritten resumes from the one before.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    _clear_unfinished(folder.parent)
    if in_place:
        if folder.exists():
            remove(folder)
        _mark(folder)
    staging = staging_path(folder, in_place=in_place)
    staging.mkdir()
    return staging


def commit(folder: Path, *, in_place: bool = False) -> None:
    """Complete a checkpoint: sync its files, write the manifest, and give the folder its name.

    Raises:
        OSError: The disk is full or read-only.
        CheckpointError: The file system cannot rename folders.
    """
    staging = staging_path(folder, in_place=in_place)
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        sync(path)
        files[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for inner in [path for path in staging.rglob("*") if path.is_dir()]:
        sync(inner)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    sync(manifest)
    sync(staging)
    if in_place:
        unfinished_mark(folder).unlink()
    else:
        _rename(staging, folder)
    sync(folder.parent)


def rollback(folder: Path, *, in_place: bool = False) -> None:
    """Remove what was written of an unfinished checkpoint, as far as the file system allows."""
    if not in_place or unfinished_mark(folder).exists():
        shutil.rmtree(staging_path(folder, in_place=in_place), ignore_errors=True)


def recover(output_dir: Path, *, in_place: bool = False) -> None:
    """Remove unfinished checkpoints, and name complete ones whose writer was killed just before it did so."""
    _clear_unfinished(output_dir)
    for partial in () if in_place else output_dir.glob(f"{_PARTIAL}{PREFIX}*"):
        folder = output_dir / partial.name.removeprefix(_PARTIAL)
        if not folder.exists() and find_corruption(partial) is None:
            partial.rename(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; if the process is killed meanwhile, the rest of it is marked as unfinished."""
    _mark(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
    unfinished_mark(folder).unlink()


def unfinished(output_dir: Path) -> list[Path]:
    """Return the checkpoints that were being written in place, or removed, when the run was killed."""
    return [folder for folder in _marked(output_dir) if folder.exists() and find_corruption(folder) is not None]


def _clear_unfinished(output_dir: Path) -> None:
    """Remove unfinished checkpoints, and all marks."""
    for folder in unfinished(output_dir):
        shutil.rmtree(folder)
    for folder in _marked(output_dir):
        unfinished_mark(folder).unlink()


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Remove the oldest checkpoints until ``limit`` are left, but never the newest one nor ``keep``."""
    checkpoints = newest_first(output_dir)
    spare = [folder for folder in checkpoints[1:] if keep is None or folder.name != keep.name]
    too_many = len(checkpoints) - max(1, limit or len(checkpoints))
    for folder in spare[::-1][: max(0, too_many)]:
        remove(folder)


def newest_first(output_dir: Path) -> list[Path]:
    """Return all checkpoint folders, highest step first: complete and damaged ones, but no unfinished ones."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    skipped = unfinished(output_dir)
    return [path for _, path in sorted(found, reverse=True) if path.is_dir() and path not in skipped]


def newest_whole(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete checkpoint or None, and the newer damaged ones, each with its fault."""
    skipped: list[tuple[Path, str]] = []
    for folder in newest_first(output_dir):
        fault = find_corruption(folder)
        if fault is None:
            return folder, skipped
        skipped.append((folder, fault))
    return None, skipped


def check(folder: Path) -> None:
    """Check that a checkpoint is complete.

    Raises:
        CheckpointError: It is not; the message names the file at fault.
    """
    fault = find_corruption(folder)
    if fault is not None:
        raise CheckpointError(f"the checkpoint {folder} cannot be resumed from: {fault}; name an earlier one")


def find_corruption(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words; None if it is complete."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or a file of it cannot be read ({first_line(error)})"
    return None


def _rename(staging: Path, folder: Path) -> None:
    if folder.exists():  # of the same step, before its evaluation; killed here, `recover` finds the new one
        remove(folder)
    try:
        staging.rename(folder)
    except OSError as error:
        if error.errno in DISK_REFUSED:
            raise
        raise CheckpointError(f"folders cannot be renamed there ({first_line(error)}); give `save_in_place`") from error


def _mark(folder: Path) -> None:
    unfinished_mark(folder).touch()
    sync(folder.parent)


def _marked(output_dir: Path) -> list[Path]:
    pattern = unfinished_mark(output_dir / f"{PREFIX}*")
    return [output_dir / mark.name[mark.name.index(PREFIX) :] for mark in output_dir.glob(pattern.name)]
