"""Mixtures, base models and adapters by their Hub ids; the Hub is never asked for local ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dylo_moe import DyLoRA_MoE, ExpertManager
from dylo_moe.core.base.hub import folder_of
from dylo_moe.core.base.loading import (
    check_base_model,
    load_base_model,
    load_tokenizer,
    local_tokenizer,
    module_names,
    portable_name,
)
from dylo_moe.errors import CheckpointError, DyLoRAError, ExpertError, ModelError
from tests.support.families import mixture, tiny, token_ids
from tests.support.hub_cache import put_in_cache, record_requests, use_cache
from tests.support.tiny_folder import write_tiny_folder

OLD, NEW = "a" * 40, "b" * 40
IDS = token_ids(1, 6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(tmp_path / "hub", monkeypatch)
    return tmp_path / "hub"


def exported(folder: Path, seed: int) -> Path:
    mixture(seed=seed).experts.export("expert_1", folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_an_adapter_comes_from_the_hub_at_a_revision(cache: Path, tmp_path: Path) -> None:
    for commit, seed, refs in ((OLD, 5, ("v1",)), (NEW, 6, ("main",))):
        put_in_cache(cache, "user/sql", exported(tmp_path / commit, seed), commit=commit, refs=refs)
    for revision, folder in ((None, NEW), ("v1", OLD), (OLD, OLD)):
        model, wanted = mixture(), mixture()
        assert model.import_expert("user/sql", revision=revision) == "sql"
        wanted.import_expert(tmp_path / folder, "sql")
        assert torch.equal(logits(model), logits(wanted))
    manager = ExpertManager(tiny())
    assert manager.import_adapter("user/sql", "again", revision="v1") == "again"
    with pytest.raises(CheckpointError, match=r"no folder 'user/sql'; as a Hub id it is not in the local cache") as no:
        manager.import_adapter("user/sql", "third", revision="v2")
    assert "\n" not in str(no.value) and manager.names == ["again"]


def test_a_mixture_and_its_base_come_from_the_hub_at_revisions(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = put_in_cache(cache, "user/base", write_tiny_folder(tmp_path / "base"), commit=OLD, refs=("main",))
    shutil.rmtree(tmp_path / "base")
    for commit, seed, refs in ((OLD, 1, ("v1",)), (NEW, 2, ("main",))):
        torch.manual_seed(seed)
        model = DyLoRA_MoE("user/base", 2, rank=2)
        torch.nn.init.normal_(model.router.gates[0])
        model.save_pretrained(tmp_path / commit)
        put_in_cache(cache, "user/mixture", tmp_path / commit, commit=commit, refs=refs)
    said = json.loads((tmp_path / NEW / "dylo_moe.json").read_text())["base_model"]
    assert (said["name"], said["from_here"]) == ("user/base", None)
    for revision, folder in ((None, NEW), ("v1", OLD), (OLD, OLD)):
        gates = DyLoRA_MoE.from_pretrained("user/mixture", revision=revision).router.gates[0]
        assert torch.equal(gates, DyLoRA_MoE.from_pretrained(tmp_path / folder).router.gates[0])
    # a folder of the cache gets its Hub id and commit
    model = DyLoRA_MoE(str(base), 1, rank=2)
    assert (model.base_name, model.revision) == ("user/base", OLD)
    model.save_pretrained(tmp_path / "mixture")
    text = "".join(file.read_text() for file in (tmp_path / "mixture").rglob("*.json"))
    assert str(cache) not in text
    assert DyLoRA_MoE.from_pretrained(tmp_path / "mixture").revision == OLD
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder 'mixtures'; give a folder, or a Hub id"):
        DyLoRA_MoE.from_pretrained("mixtures")


def test_names_of_bases() -> None:
    assert portable_name("user/base", "v1") == ("user/base", "v1")
    assert portable_name("gpt2", None) == ("gpt2", None)


def test_the_embedded_model_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dylo_moe.core.base.loading.embedded_folder", lambda: tmp_path / "base")
    base = write_tiny_folder(tmp_path / "base")
    assert DyLoRA_MoE(str(base), 1, rank=2).base_name == "demo"


# --- local names do not reach the Hub --------------------------------------------------------------------------------

LOCAL = ("/nowhere/base", "./nowhere", "../nowhere", "~/nowhere", "models/of/mine", "a\\b")
LOADERS: dict[str, Callable[[str], object]] = {
    "base": load_base_model,
    "tokenizer": load_tokenizer,
    "check": check_base_model,
    "modules": module_names,
    "new mixture": lambda name: DyLoRA_MoE(name, 1),
    "mixture": DyLoRA_MoE.from_pretrained,
    "adapter": lambda name: ExpertManager(tiny()).import_adapter(name, "sql"),
}


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("load", LOADERS)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    name: str, load: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = record_requests(monkeypatch)
    with pytest.raises(DyLoRAError, match=r"there is no folder|is not a checkpoint") as refused:
        LOADERS[load](name)
    assert isinstance(refused.value, ModelError | CheckpointError | ExpertError)
    assert not asked and "\n" not in str(refused.value)


def test_a_tokenizer_that_may_be_missing_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record_requests(monkeypatch)
    for name in ("", *LOCAL, "user/base"):
        assert local_tokenizer(name, None) is None
    assert not asked


def test_a_folder_is_loaded_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record_requests(monkeypatch)
    model = DyLoRA_MoE(str(write_tiny_folder(tmp_path / "base")), 1, rank=2)
    model.save_pretrained(tmp_path / "mixture")
    model.experts.export("expert_0", tmp_path / "sql")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "mixture")
    loaded.import_expert(tmp_path / "sql")
    loaded.save_pretrained(tmp_path / "mixture")
    assert not asked


def test_the_guard_sees_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record_requests(monkeypatch)
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        folder_of("user/sql")
    assert asked
