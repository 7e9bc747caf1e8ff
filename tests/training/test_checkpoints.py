"""Whole checkpoints are told from torn ones, and only whole ones have a name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dylo_moe.errors import CheckpointError
from dylo_moe.training import checkpoints
from dylo_moe.training.checkpoints import MANIFEST, folder_of


def written(output: Path, step: int) -> Path:
    folder = folder_of(output, step)
    partial = checkpoints.begin(folder)
    (partial / "experts").mkdir()
    (partial / "experts" / "weights").write_bytes(bytes(range(256)) * step)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    checkpoints.finish(folder)
    return folder


def test_a_checkpoint_is_whole_once_it_has_its_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "new" / "run", 3)
    partial = checkpoints.begin(folder)
    (partial / "state.json").write_text("{}")
    assert not folder.exists() and checkpoints.newest_first(folder.parent) == []
    checkpoints.finish(folder)
    assert checkpoints.problem(folder) is None
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
        (lambda folder: os.truncate(folder / "state.json", 3), "state.json has 3 bytes in the place of 13"),
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


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for step in (1, 2):
        (written(tmp_path, step) / MANIFEST).unlink()
    whole, skipped = checkpoints.newest_whole(tmp_path)
    assert whole is None and [path.name for path, _ in skipped] == ["checkpoint-2", "checkpoint-1"]
    assert checkpoints.newest_whole(tmp_path / "none") == (None, [])


def test_the_oldest_go_and_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in (9, 10, 20, 100):
        written(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, keep=folder_of(tmp_path, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-9"]
    checkpoints.rotate(tmp_path, None, keep=None)
    checkpoints.rotate(tmp_path, 1, keep=folder_of(tmp_path, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-9"]
    checkpoints.rotate(tmp_path, 1, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-100"]


def test_leftovers_of_a_killed_run_are_cleared_away(tmp_path: Path) -> None:
    (checkpoints.begin(folder_of(tmp_path, 4)) / "half").write_text("x")
    assert checkpoints.newest_first(tmp_path) == []
    written(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = written(tmp_path, 5)
    (folder / "old").write_text("x")
    written(tmp_path, 5)
    assert checkpoints.problem(folder) is None and not (folder / "old").exists()


def test_a_whole_checkpoint_whose_writer_was_killed_before_naming_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed where the old checkpoint of the same step is gone and the new one has no name yet."""
    folder = written(tmp_path, 5)
    (checkpoints.begin(folder_of(tmp_path, 7)) / "half").write_text("x")
    checkpoints.recover(tmp_path)
    assert not folder_of(tmp_path, 7).exists()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_second_rename())
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, 5)
    assert checkpoints.newest_whole(tmp_path) == (None, [])
    checkpoints.recover(tmp_path)
    assert checkpoints.newest_whole(tmp_path) == (folder, [])


def killed_at_the_second_rename() -> Callable[[Path, Path], Path]:
    renames, rename = iter((True, False)), Path.rename

    def renamed_or_killed(path: Path, target: Path) -> Path:
        if not next(renames):
            raise KeyboardInterrupt
        return rename(path, target)

    return renamed_or_killed
