"""Training checkpoints that cannot be lost: written, listed with digests, and only then given their name.

A checkpoint is whole if it has a manifest and every file of it has the size and the SHA-256 that the manifest says.
The manifest is written last. So a reader tells a whole checkpoint from a torn one wherever a run was killed.

Checkpoints are written beside and renamed. On object storage a folder cannot be renamed in one step, or at all: there
they are written in place, and a mark beside says that what stands under the name is not finished.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylo_moe.durable import sha256_of, sync, unfinished_mark
from dylo_moe.errors import DISK_REFUSED, CheckpointError, first_line

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
_NAME = re.compile(rf"{PREFIX}(\d+)")
_PARTIAL = ".partial-"
"""Begins the name of a folder that is being written; no reader looks at it."""


def folder_of(output_dir: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return output_dir / f"{PREFIX}{step}"


def place_of(folder: Path, *, in_place: bool = False) -> Path:
    """Where a checkpoint is written, the same for every process."""
    return folder if in_place else folder.with_name(f"{_PARTIAL}{folder.name}")


def begin(folder: Path, *, in_place: bool = False) -> Path:
    """An empty folder to write a checkpoint into; leftovers of runs that were killed are removed.

    Args:
        folder: The checkpoint.
        in_place: Write it under its own name. One of the same step, saved before its evaluation, is then gone while the
            new one is written: killed here, the run goes on from the one before.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    clear_unfinished(folder.parent)
    if in_place:
        if folder.exists():
            remove(folder)
        _mark(folder)
    place = place_of(folder, in_place=in_place)
    place.mkdir()
    return place


def finish(folder: Path, *, in_place: bool = False) -> None:
    """Makes what was written into the checkpoint: synced, listed, synced again, and given its name.

    Raises:
        OSError: The disk is full, or protected.
        CheckpointError: Folders cannot be renamed there.
    """
    place = place_of(folder, in_place=in_place)
    files = {str(path.relative_to(place)): _entry(path) for path in _files(place)}
    for inner in [path for path in place.rglob("*") if path.is_dir()]:
        sync(inner)
    manifest = place / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    sync(manifest)
    sync(place)
    if in_place:
        unfinished_mark(folder).unlink()
    else:
        _rename(place, folder)
    sync(folder.parent)


def abandon(folder: Path, *, in_place: bool = False) -> None:
    """Removes what was written of a checkpoint that cannot be finished, as far as the file system lets it."""
    if not in_place or unfinished_mark(folder).exists():
        shutil.rmtree(place_of(folder, in_place=in_place), ignore_errors=True)


def recover(output_dir: Path, *, in_place: bool = False) -> None:
    """Removes what is not finished; gives checkpoints their name that are whole, but whose writer was killed before."""
    clear_unfinished(output_dir)
    for partial in () if in_place else output_dir.glob(f"{_PARTIAL}{PREFIX}*"):
        folder = output_dir / partial.name.removeprefix(_PARTIAL)
        if not folder.exists() and problem(partial) is None:
            partial.rename(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint; killed in between, what is left of it is marked, and counts as nothing."""
    _mark(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
    unfinished_mark(folder).unlink()


def unfinished(output_dir: Path) -> list[Path]:
    """Checkpoints that were being written in place, or removed, when the run was killed."""
    return [folder for folder in _marked(output_dir) if folder.exists() and problem(folder) is not None]


def clear_unfinished(output_dir: Path) -> None:
    """Removes unfinished checkpoints, and the marks."""
    for folder in unfinished(output_dir):
        shutil.rmtree(folder)
    for folder in _marked(output_dir):
        unfinished_mark(folder).unlink()


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Removes the oldest checkpoints until ``limit`` are left; never the newest one, nor ``keep``."""
    checkpoints = newest_first(output_dir)
    spare = [folder for folder in checkpoints[1:] if keep is None or folder.name != keep.name]
    too_many = len(checkpoints) - max(1, limit or len(checkpoints))
    for folder in spare[::-1][: max(0, too_many)]:
        remove(folder)


def newest_first(output_dir: Path) -> list[Path]:
    """All checkpoint folders by step, whole or damaged, but for unfinished ones."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    not_yet = unfinished(output_dir)
    return [path for _, path in sorted(found, reverse=True) if path.is_dir() and path not in not_yet]


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
            if sha256_of(path) != entry["sha256"]:
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
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _rename(place: Path, folder: Path) -> None:
    if folder.exists():  # of the same step, before its evaluation; killed here, `recover` finds the new one
        remove(folder)
    try:
        place.rename(folder)
    except OSError as error:
        if error.errno in DISK_REFUSED:
            raise
        raise CheckpointError(f"folders cannot be renamed there ({first_line(error)}); give --save_in_place") from error


def _mark(folder: Path) -> None:
    unfinished_mark(folder).touch()
    sync(folder.parent)


def _marked(output_dir: Path) -> list[Path]:
    pattern = unfinished_mark(output_dir / f"{PREFIX}*")
    return [output_dir / mark.name[mark.name.index(PREFIX) :] for mark in output_dir.glob(pattern.name)]
