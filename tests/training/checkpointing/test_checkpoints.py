"""Only complete checkpoints get their name, and incomplete or damaged ones are recognized."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from dylo_moe.errors import CheckpointError
from dylo_moe.training.checkpointing import checkpoints
from dylo_moe.training.checkpointing.checkpoints import MANIFEST, folder_of
from tests.support import flat_bucket


def written(output: Path, step: int, in_place: bool = False) -> Path:
    folder = folder_of(output, step)
    place = checkpoints.begin_write(folder, in_place=in_place)
    (place / "experts").mkdir()
    (place / "experts" / "weights").write_bytes(bytes(range(256)) * step)
    (place / "state.json").write_text(json.dumps({"step": step}))
    checkpoints.commit(folder, in_place=in_place)
    return folder


@pytest.mark.parametrize("in_place", [False, True])
def test_a_checkpoint_counts_once_it_is_finished(tmp_path: Path, in_place: bool) -> None:
    folder = folder_of(tmp_path / "new" / "run", 3)
    place = checkpoints.begin_write(folder, in_place=in_place)
    (place / "state.json").write_text("{}")
    assert folder.exists() == in_place and checkpoints.newest_first(folder.parent) == []
    assert checkpoints.unfinished(folder.parent) == ([folder] if in_place else [])
    checkpoints.commit(folder, in_place=in_place)
    assert checkpoints.find_corruption(folder) is None and checkpoints.newest_first(folder.parent) == [folder]
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(listed) == ["state.json"] and listed["state.json"]["bytes"] == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "experts" / "weights"), "experts/weights has other contents than were written"),
        (lambda folder: os.truncate(folder / "state.json", 3), "state.json has 3 bytes instead of 13"),
        (lambda folder: (folder / "experts" / "weights").unlink(), "experts/weights is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json, so it was not finished"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json or a file of it cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json or a file of it cannot be read"),
        (lambda folder: shutil.rmtree(folder / "experts"), "experts/weights is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path: Path, damage: object, said: str) -> None:
    older, newer = written(tmp_path, 20), written(tmp_path, 100)
    assert checkpoints.newest_whole(tmp_path) == (newer, [])
    assert callable(damage)
    damage(newer)
    whole, skipped = checkpoints.newest_whole(tmp_path)
    assert whole == older
    ((folder, wrong),) = skipped
    assert folder == newer and said in wrong
    with pytest.raises(CheckpointError, match=r"checkpoint-100 cannot be resumed from: "):
        checkpoints.check(newer)
    checkpoints.check(older)


def test_if_all_are_damaged_none_is_returned(tmp_path: Path) -> None:
    for step in (1, 2):
        (written(tmp_path, step) / MANIFEST).unlink()
    whole, skipped = checkpoints.newest_whole(tmp_path)
    assert whole is None and [path.name for path, _ in skipped] == ["checkpoint-2", "checkpoint-1"]
    assert checkpoints.newest_whole(tmp_path / "none") == (None, [])


def test_rotation_removes_the_oldest_but_not_the_newest_nor_the_best(tmp_path: Path) -> None:
    for step in (9, 10, 20, 100):
        written(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, keep=folder_of(tmp_path, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-9"]
    checkpoints.rotate(tmp_path, None, keep=None)
    checkpoints.rotate(tmp_path, 1, keep=folder_of(tmp_path, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-9"]
    checkpoints.rotate(tmp_path, 1, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-100"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("was_in_place", [False, True])
def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, was_in_place: bool, in_place: bool) -> None:
    (checkpoints.begin_write(folder_of(tmp_path, 4), in_place=was_in_place) / "half").write_text("x")
    assert checkpoints.newest_first(tmp_path) == []
    written(tmp_path, 5, in_place)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, in_place: bool) -> None:
    folder = written(tmp_path, 5, in_place)
    (folder / "old").write_text("x")
    written(tmp_path, 5, in_place)
    assert checkpoints.find_corruption(folder) is None and not (folder / "old").exists()


def test_a_complete_checkpoint_is_recovered_if_its_writer_was_killed_before_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the old checkpoint of the same step is removed and before the new one has its name."""
    folder = written(tmp_path, 5)
    (checkpoints.begin_write(folder_of(tmp_path, 7)) / "half").write_text("x")
    checkpoints.recover(tmp_path)
    assert not folder_of(tmp_path, 7).exists()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, 5)
    assert checkpoints.newest_whole(tmp_path) == (None, [])
    checkpoints.recover(tmp_path)
    assert checkpoints.newest_whole(tmp_path) == (folder, [])


def killed(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


KILLED_WHILE = {"writing": (Path, "write_text"), "listing": (hashlib, "file_digest"), "removing": (shutil, "rmtree")}


@pytest.mark.parametrize("work", KILLED_WHILE)
def test_an_unfinished_checkpoint_written_in_place_is_ignored(
    tmp_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, folder = written(tmp_path, 4, in_place=True), folder_of(tmp_path, 5)
    if work == "removing":
        written(tmp_path, 5, in_place=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*KILLED_WHILE[work], killed)
        if work == "removing":
            checkpoints.remove(folder)
        else:
            written(tmp_path, 5, in_place=True)
    assert folder.exists() and checkpoints.unfinished(tmp_path) == [folder]
    assert checkpoints.newest_whole(tmp_path) == (older, []) and checkpoints.newest_first(tmp_path) == [older]
    checkpoints.recover(tmp_path, in_place=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_complete_checkpoint_is_kept_even_if_it_is_marked(tmp_path: Path) -> None:
    """Killed between writing the manifest and removing the mark, or before anything was removed."""
    folder = written(tmp_path, 5, in_place=True)
    (tmp_path / ".unfinished-checkpoint-5").touch()
    assert checkpoints.newest_whole(tmp_path) == (folder, []) and checkpoints.unfinished(tmp_path) == []
    checkpoints.recover(tmp_path, in_place=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_truncated_manifest_makes_the_checkpoint_unfinished(tmp_path: Path) -> None:
    folder = written(tmp_path, 5, in_place=True)
    (tmp_path / ".unfinished-checkpoint-5").touch()
    os.truncate(folder / MANIFEST, 20)
    assert checkpoints.unfinished(tmp_path) == [folder] and checkpoints.newest_whole(tmp_path) == (None, [])


def test_the_error_for_a_failed_rename_names_save_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat_bucket.install(tmp_path, monkeypatch.setattr)
    with pytest.raises(CheckpointError, match=r"folders cannot be renamed there \(.*\); give `save_in_place`"):
        written(tmp_path, 5)
    for step in (5, 6, 6, 7):
        written(tmp_path, step, in_place=True)
    checkpoints.rotate(tmp_path, 2, keep=None)
    assert checkpoints.newest_first(tmp_path) == [folder_of(tmp_path, 7), folder_of(tmp_path, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_rollback_removes_only_unfinished_checkpoints(tmp_path: Path) -> None:
    whole = written(tmp_path, 5, in_place=True)
    checkpoints.rollback(whole, in_place=True)
    assert checkpoints.find_corruption(whole) is None
    for in_place in (False, True):
        place = checkpoints.begin_write(folder_of(tmp_path, 6), in_place=in_place)
        checkpoints.rollback(folder_of(tmp_path, 6), in_place=in_place)
        assert not place.exists()
