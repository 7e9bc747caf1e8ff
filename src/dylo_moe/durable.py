"""Files and folders that a reader sees whole or not at all, whenever the writer is killed.

Content is written under another name, synced to the disk, and renamed. ``atomic_directory`` can also write in place,
for object storage, where a folder cannot be renamed. What the files hold is up to the caller.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from dylo_moe.errors import CheckpointError

_README = "README.md"
"""A file that a person may have put into a folder before anything is saved there."""


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yield a UTF-8 text file that replaces ``path`` at the end of the block.

    If the block or the writing fails, the new file is removed and ``path`` stays as it was.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_directory(
    path: Path, *, marker: str | None = None, in_place: bool = False, ours: Collection[str] | None = None
) -> Iterator[Path]:
    """Yield an empty folder that replaces ``path`` at the end of the block.

    If the block or the writing fails, the new folder is removed and ``path`` stays as it was.

    Args:
        path: The folder to make or replace.
        marker: A file that every folder of this kind has. A folder that has other files and not this one is not
            replaced. None makes a new folder and replaces nothing.
        in_place: Rename no folder: write elsewhere, then copy to ``path``. The marker is removed first and copied
            last, so that no reader takes a half-written folder for a whole one. Needs a marker.
        ours: Names of the files that are written, or may be left from the last time. All other files in ``path`` are
            kept, and a folder without the marker is refused only if it has files of these names.

    Raises:
        CheckpointError: ``path`` holds other files, or the file system refused: full, read-only, no permission.
    """
    path = path.absolute()
    _check_replaceable(path, marker, ours)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=None if in_place else path.parent))
        target = scratch / "new"
        target.mkdir()
        yield target
        if in_place:
            assert marker is not None, "writing in place needs a marker"
            _copy_over(target, path, marker, ours)
        else:
            if ours is not None and path.is_dir():
                _link_others(path, target, ours)
            _sync_tree(target)
            _rename_over(target, path, None if marker is None else scratch / "previous")
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        kept = "; the previous one is intact" if marker is not None and (path / marker).is_file() else ""
        raise CheckpointError(f"cannot write {path}: {error}{kept}; free space or choose another folder") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def unfinished_mark(folder: Path) -> Path:
    """Return the path of an empty file next to a folder that marks it as half-written or half-removed."""
    return folder.with_name(f".unfinished-{folder.name}")


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Wait until a folder and everything below it are on the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            sync(Path(root) / file)
        sync(Path(root))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_replaceable(path: Path, marker: str | None, ours: Collection[str] | None) -> None:
    known = marker is not None and ((path / marker).is_file() or unfinished_mark(path).exists())
    if known or not path.is_dir():
        return
    others = sorted(entry.name for entry in path.iterdir())
    if ours is not None:
        others = [name for name in others if name in ours and name != _README]
    if others:
        raise CheckpointError(
            f"{path} holds other files ({others[0]}), and writing would replace them; choose a new or empty folder"
        )


def _rename_over(new: Path, path: Path, previous: Path | None) -> None:
    """Rename ``new`` to ``path``; with ``previous``, a folder that is there moves to it first."""
    if previous is not None and path.exists():
        path.rename(previous)
    try:
        new.rename(path)
    except OSError:
        if previous is not None and previous.exists():
            previous.rename(path)
        raise


def _copy_over(new: Path, path: Path, marker: str, ours: Collection[str] | None) -> None:
    mark = unfinished_mark(path)
    mark.touch()
    if path.exists():
        (path / marker).unlink(missing_ok=True)
        for entry in [path] if ours is None else [path / name for name in ours]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    skip = {marker}
    shutil.copytree(
        new,
        path,
        ignore=lambda folder, names: skip if Path(folder) == new else set(),
        dirs_exist_ok=ours is not None,
    )
    _sync_tree(path)
    shutil.copyfile(new / marker, path / marker)
    _sync_tree(path)
    mark.unlink()


def _link_others(old: Path, new: Path, ours: Collection[str]) -> None:
    """Give the new folder the old one's other files: as hard links or, where the file system has none, copies."""
    for entry in old.iterdir():
        if entry.name in ours or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
