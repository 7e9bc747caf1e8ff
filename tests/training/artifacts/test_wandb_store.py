"""Weights & Biases, with the real client and a local server: stored artifacts, runs, and failures."""

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dylo_moe.errors import ArtifactError, ConfigError
from dylo_moe.training.artifacts import wandb_store
from dylo_moe.training.artifacts.fetch import fetch_checkpoint
from dylo_moe.training.artifacts.store import ArtifactCallback
from dylo_moe.training.artifacts.wandb_store import WandbStore
from dylo_moe.training.checkpointing import checkpoints
from tests.support.fake_wandb import KEY, FakeWandb
from tests.training.artifacts.test_store import checkpoint, files, leftovers, stored

pytest.importorskip("wandb", reason="the client is an extra")

REFERENCE = "me/code/checkpoint-r1:step-7"


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """Yield a local server, with the real client set up to use it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    fake = FakeWandb()
    for name, value in {"BASE_URL": fake.url, "API_KEY": KEY, "SILENT": "true", "HTTP_TIMEOUT": "3"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "client"))
    monkeypatch.setattr(wandb_store, "API_SECONDS", 5)
    monkeypatch.setattr(wandb_store, "UPLOAD_SECONDS", 5)
    monkeypatch.setattr(wandb_store, "FINISH_SECONDS", 2)
    yield fake
    client = importlib.import_module("wandb")
    if client.run is not None:
        client.run.finish()
    client.teardown()
    fake.stop()
    assert not fake.unknown, "the client sends operations that the fake server does not know"


def wandb_run(tmp_path: Path) -> WandbStore:
    run = wandb_store.start_run(tmp_path / "before", project="code", entity="me", name=None, continues=False)
    return WandbStore(run)


def test_a_checkpoint_comes_back_from_wandb(wandb: FakeWandb, tmp_path: Path) -> None:
    store = wandb_run(tmp_path)
    assert stored(store, tmp_path) == REFERENCE
    store.wait()
    found = fetch_checkpoint(REFERENCE, tmp_path / "out")
    assert files(found) == files(tmp_path / "before" / "checkpoint-7")
    entry = json.loads((tmp_path / "out" / "wandb_run.json").read_text())
    assert entry == {"id": "r1", "project": "code", "entity": "me"}
    with pytest.raises(ArtifactError, match="did not find the artifact 'me/code/x:v0', or this key may not see it"):
        fetch_checkpoint("me/code/x:v0", tmp_path / "out")


def test_a_wrong_digest_is_refused_and_nothing_is_left(wandb: FakeWandb, tmp_path: Path) -> None:
    store = wandb_run(tmp_path)
    stored(store, tmp_path)
    store.wait()
    wandb.damage(REFERENCE, "experts/adapter.safetensors")
    with pytest.raises(ArtifactError, match="is not what was put there"):
        fetch_checkpoint(REFERENCE, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("key", "message"),
    [(KEY[::-1], "set WANDB_API_KEY to a key of your account"), ("short", "set WANDB_API_KEY"), (KEY, None)],
)
def test_a_wrong_key_is_one_line_of_error(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, message: str | None
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    uses = [wandb_store.check_access, lambda: WandbStore().describe(REFERENCE), lambda: wandb_run(tmp_path)]
    if message is None:
        uses[0]()
        return
    for use in uses:
        with pytest.raises(ArtifactError, match=message) as raised:
            use()
        assert "\n" not in str(raised.value)


def test_an_unreachable_server_is_one_line_of_error(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.stop()
    for use in (wandb_store.check_access, lambda: fetch_checkpoint(REFERENCE, tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"cannot be reached for .*WANDB_MODE=offline") as raised:
            use()
        assert "\n" not in str(raised.value)


def test_the_error_offline_names_what_needs_the_network(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ArtifactError, match=r"needs the network, and WANDB_MODE=offline.*`resume_from_checkpoint`"):
        fetch_checkpoint(REFERENCE, tmp_path / "out")
    wandb_store.check_access()  # an offline run needs no network
    store = wandb_run(tmp_path)
    stored(store, tmp_path)
    store.wait()
    assert not wandb.runs and not wandb.artifacts
    assert list((tmp_path / "before" / "wandb").glob("offline-run-*"))


def test_without_the_client_the_error_has_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for use in (wandb_store.check_access, lambda: fetch_checkpoint(REFERENCE, tmp_path)):
        with pytest.raises(ConfigError, match=r"pip install 'dylora-moe\[wandb\]'"):
            use()


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(wandb: FakeWandb, tmp_path: Path) -> None:
    def start(continues: bool, project: str | None = None) -> Any:
        run = wandb_store.start_run(tmp_path, project=project, entity=None, name=None, continues=continues)
        run.finish()
        return run

    first, again, other = start(False, "code"), start(True), start(False)
    assert (again.id, again.project, again.resumed) == (first.id, "code", True)
    assert (other.id != first.id, other.project, other.resumed) == (True, wandb_store.PROJECT, False)
    assert wandb.runs == {first.id, other.id}


def test_training_continues_without_wandb_after_one_warning(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    callback = ArtifactCallback(wandb_run(tmp_path), "r1")
    args = TrainingArguments(output_dir=str(output), report_to="none", use_cpu=True)
    state = TrainerState(is_world_process_zero=True)

    def save(step: int) -> None:
        checkpoint(output, step)
        state.global_step = step
        callback.on_save(args, state, TrainerControl())

    with caplog.at_level(logging.WARNING):
        save(1)
        callback.store.wait()
        wandb.stop()
        save(2)
        save(3)
        callback.finish(output / "checkpoint-3", 3)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("dylo_moe")]
    assert len(warnings) == 1 and "cannot be reached" in warnings[0]
    assert "the run continues" in warnings[0] and str(output) in warnings[0]
    assert [name for name in wandb.artifacts if "step-" in name] == ["me/code/checkpoint-r1:step-1"]
    assert all(checkpoints.find_corruption(output / f"checkpoint-{step}") is None for step in (1, 2, 3))
