"""Artifacts come back unchanged, damaged ones are refused, and a failed fetch leaves nothing behind."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dylo_moe.errors import ArtifactError, CheckpointError, ConfigError, DyLoRAError
from dylo_moe.training.artifacts.fetch import fetch_checkpoint, fetch_mixture, store_of, was_resumed_from
from dylo_moe.training.artifacts.store import RETRY_SECONDS, ArtifactCallback, ArtifactStore, FolderStore
from dylo_moe.training.checkpointing import checkpoints
from tests.support import flat_bucket


def checkpoint(output: Path, step: int, weights: str = "weights") -> Path:
    """Write a complete checkpoint as training does."""
    folder = checkpoints.folder_of(output, step)
    partial = checkpoints.begin_write(folder)
    (partial / "experts").mkdir()
    (partial / "experts" / "adapter.safetensors").write_text(f"{weights} of {step}")
    (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoints.commit(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(store: ArtifactStore, tmp_path: Path, step: int = 7) -> str:
    return store.put(checkpoint(tmp_path / "before", step), "checkpoint-r1", {"run_id": "r1", "step": step})


def leftovers(output: Path) -> list[str]:
    """Return everything in an output folder except complete checkpoints and the records about them."""
    records = {"fetched.json", "wandb_run.json"}
    return [path.name for path in output.iterdir() if path.name not in records and checkpoints.find_corruption(path)]


def test_a_folder_store_returns_the_files_that_were_put(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    folder = checkpoint(tmp_path, 3)
    assert store.put(folder, "mine", {"step": 3}) == f"folder:{tmp_path}/store/mine:v0"
    store.put(checkpoint(tmp_path, 4), "mine", {"step": 4})
    assert files(store.fetch("mine:v0", tmp_path / "got")) == files(folder)
    assert store.describe("mine:latest").metadata == {"step": 4}
    assert store.describe("mine:v1").digest != store.describe("mine:v0").digest


def test_the_error_for_an_unknown_version_lists_the_known_ones(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with pytest.raises(ArtifactError, match=r"no artifact 'mine:v0' .versions of 'mine': none"):
        store.describe("mine:v0")
    store.put(checkpoint(tmp_path / "out", 3), "mine", {})
    with pytest.raises(ArtifactError, match=r"no artifact 'mine:v5' .versions of 'mine': v0"):
        store.fetch("mine:v5", tmp_path / "got")


def test_a_byte_flipped_in_the_store_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(checkpoint(tmp_path / "before", 3), "mine", {})
    path = tmp_path / "store/mine/v0/files/experts/adapter.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])
    with pytest.raises(ArtifactError, match="is not what was put there"):
        store.fetch("mine:v0", tmp_path / "after" / "got")
    assert list((tmp_path / "after").iterdir()) == []


def test_a_note_of_the_artifact_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, output = stored(FolderStore(tmp_path / "store"), tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "fetched.json").write_text("old")
    opened = Path.open

    def on_a_full_disk(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.startswith(".fetched.json-"):
            return open("/dev/full", "w", encoding="utf-8")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        fetch_checkpoint(reference, output)
    assert (output / "fetched.json").read_text() == "old"
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


MALFORMED = ["nonsense", "a/b", "a:v0", "a/b/c/d:v0", "folder:x:v0", "folder:x/y", "a/b c:v0"]


@pytest.mark.parametrize("reference", MALFORMED)
def test_the_error_for_a_malformed_reference_shows_the_format(reference: str) -> None:
    with pytest.raises(ConfigError, match="`wandb_checkpoint_artifact` must be like user/project/artifact:v0"):
        store_of(reference)


def test_a_fetched_checkpoint_gets_its_name_and_its_run_continues(tmp_path: Path) -> None:
    reference = stored(FolderStore(tmp_path / "store"), tmp_path)
    output = tmp_path / "out"
    assert not was_resumed_from(reference, output)
    found = fetch_checkpoint(reference, output)
    assert found == output / "checkpoint-7"
    assert files(found) == files(tmp_path / "before" / "checkpoint-7")
    assert json.loads((output / "wandb_run.json").read_text())["id"] == "r1"
    assert was_resumed_from(reference, output)
    assert not was_resumed_from(stored(FolderStore(tmp_path / "store"), tmp_path, step=8), output)
    (found / "trainer_state.json").unlink()
    assert not was_resumed_from(reference, output), "nothing is left to resume from"
    assert leftovers(output) == ["checkpoint-7"]


def test_checkpoints_of_another_run_are_removed_only_after_the_fetched_one_is_verified(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    damaged, whole = stored(store, tmp_path), stored(store, tmp_path)
    path = tmp_path / "store/checkpoint-r1/v0/files/experts/adapter.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])
    output = tmp_path / "out"
    old = [checkpoint(output, 7, "other weights"), checkpoint(output, 9)]
    (output / "wandb_run.json").write_text('{"id": "another"}')
    with pytest.raises(ArtifactError, match="is not what was put there"):
        fetch_checkpoint(damaged, output, replacing=old)
    assert [checkpoints.find_corruption(folder) for folder in old] == [None, None]
    found = fetch_checkpoint(whole, output, replacing=old)
    assert checkpoints.newest_first(output) == [found]
    assert files(found) == files(tmp_path / "before" / "checkpoint-7")
    assert json.loads((output / "wandb_run.json").read_text())["id"] == "r1"
    assert leftovers(output) == []


def test_a_checkpoint_is_fetched_to_object_storage_without_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, output = stored(FolderStore(tmp_path / "store"), tmp_path), tmp_path / "out"
    flat_bucket.install(output, monkeypatch.setattr)
    old = checkpoint(tmp_path / "before", 9)
    shutil.copytree(old, output / old.name)
    found = fetch_checkpoint(reference, output, replacing=[output / old.name], in_place=True)
    assert checkpoints.newest_whole(output) == (found, []) and checkpoints.newest_first(output) == [found]
    assert files(found) == files(tmp_path / "before" / "checkpoint-7")
    assert leftovers(output) == []


def test_a_damaged_checkpoint_and_a_model_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    folder = checkpoint(tmp_path / "before", 7)
    (folder / "experts" / "adapter.safetensors").write_text("weights of 8")
    reference = store.put(folder, "damaged", {})
    with pytest.raises(CheckpointError, match=r"damaged: experts/adapter.safetensors has other contents"):
        fetch_checkpoint(reference, tmp_path / "out")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "dylo_moe.json").write_text("{}")
    for metadata in ({}, {"kind": "model"}):
        with pytest.raises(ArtifactError, match=r"not a training checkpoint|is a model"):
            fetch_checkpoint(store.put(tmp_path / "model", "model", metadata), tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_a_mixture_is_fetched_once_per_digest_and_other_artifacts_are_refused(tmp_path: Path) -> None:
    store, root = FolderStore(tmp_path / "store"), tmp_path / "artifacts"
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("first")
    with pytest.raises(ArtifactError, match=r"is not a mixture: it has no dylo_moe.json"):
        fetch_mixture(store.put(model, "model", {}), root)
    (model / "dylo_moe.json").write_text("{}")
    first = fetch_mixture(store.put(model, "model", {}), root)
    assert files(first) == files(model)
    # the name now means another version: the newest is fetched, and the old folder stays as it was
    reference = f"folder:{tmp_path / 'store'}/model:latest"
    assert fetch_mixture(reference, root) == first
    (model / "weights").write_text("second")
    store.put(model, "model", {})
    assert files(fetch_mixture(reference, root)) == files(model) != files(first)
    damaged = store.put(model, "x", {})
    (tmp_path / "store/x/v0/files/weights").write_text("other")
    shutil.rmtree(root)
    with pytest.raises(ArtifactError, match="is not what was put there"):
        fetch_mixture(damaged, root)
    assert leftovers(root) == []
    with pytest.raises(ConfigError, match="`wandb_artifact` must be like"):
        fetch_mixture("model", root)


def test_only_the_first_process_uploads(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    checkpoint(tmp_path, 1)
    for first in (False, True):
        ArtifactCallback(store, "r1").on_save(
            args, TrainerState(is_world_process_zero=first, global_step=1), TrainerControl()
        )
    assert store.describe("checkpoint-r1:latest").metadata["step"] == 1
    with pytest.raises(DyLoRAError):
        store.describe("checkpoint-r1:v1")


def test_after_a_failure_uploads_pause(tmp_path: Path) -> None:
    class Failing(FolderStore):
        attempts = 0

        def put(self, folder: Path, name: str, metadata: Mapping[str, Any]) -> str:
            self.attempts += 1
            raise ArtifactError("not today")

    now = [0.0]
    store = Failing(tmp_path / "store")
    callback = ArtifactCallback(store, "r1", clock=lambda: now[0])
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for step in range(5):
        now[0] = step * RETRY_SECONDS / 2
        checkpoint(tmp_path, step)
        callback.on_save(args, TrainerState(is_world_process_zero=True, global_step=step), TrainerControl())
    assert store.attempts == 3
    callback.finish(tmp_path / "checkpoint-4", 4)
    assert store.attempts == 4, "the best model is always put"
