"""Files and folders are whole or not there: a failing write and a kill leave the old ones."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dylo_moe.durable import atomic_directory, atomic_file, sha256_of
from dylo_moe.errors import CheckpointError

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from dylo_moe.durable import atomic_file

with atomic_file(Path(sys.argv[1])) as file:
    file.write("half of the new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_and_keeps_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for text in ("old", "new"):
        with atomic_file(tmp_path / "new" / "file") as file:
            file.write(text)
    path = tmp_path / "new" / "file"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(path) as file:
        file.write("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write("new")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_folder_without_a_marker_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_directory(path) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(CheckpointError, match="holds other files"), atomic_directory(path):
        raise AssertionError("nothing may be written")
    assert (path / "file").read_text() == "old"


def test_of_two_writers_of_a_new_folder_the_first_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(CheckpointError, match="cannot write"), atomic_directory(path) as second:
        with atomic_directory(path) as first:
            (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (path / "file").read_text() == "first" and os.listdir(tmp_path) == ["folder"]


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
