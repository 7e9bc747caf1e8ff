"""A mixture whose base model has been moved since the mixture was made."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import CheckpointError, ModelError
from dylo_moe.skills.expert_edits import rename_expert
from dylo_moe.skills.library import SkillLibrary, save_with_skills
from tests.support.families import token_ids
from tests.support.tiny_folder import write_tiny_folder

IDS = token_ids(1, 6)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return a folder with ``base`` and ``mixture``."""
    (tmp_path / "here").mkdir()
    base = write_tiny_folder(tmp_path / "here" / "base")
    DyLoRA_MoE(str(base), 2, rank=2, routing="prefix:1").save_pretrained(tmp_path / "here" / "mixture")
    return tmp_path / "here"


def base_entry(mixture: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((mixture / "dylo_moe.json").read_text())["base_model"]
    return found


@pytest.mark.parametrize("name", ["base", "./base", "../here/base"])
def test_a_relative_path_works_from_anywhere(
    made: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    model = DyLoRA_MoE(name, 2, rank=2)
    model.save_pretrained("relative")
    assert base_entry(made / "relative")["name"] == str(made / "base")
    assert base_entry(made / "relative")["from_here"] == "../base"
    monkeypatch.chdir(tmp_path)
    assert DyLoRA_MoE.from_pretrained("here/relative").base_name == str(made / "base")
    monkeypatch.chdir("/")
    assert DyLoRA_MoE.from_pretrained(made / "relative").base_name == str(made / "base")


def test_moved_together_they_find_each_other(made: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = DyLoRA_MoE.from_pretrained(made / "mixture")(IDS).logits
    made.rename(tmp_path / "there")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "there" / "mixture")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert base_entry(tmp_path / "again")["name"] == str(tmp_path / "there" / "base")


def test_with_skills_they_find_each_other_too(made: Path, tmp_path: Path) -> None:
    model = DyLoRA_MoE.from_pretrained(made / "mixture")
    save_with_skills(model, SkillLibrary(model.router.hidden_size), made / "skills")
    assert base_entry(made / "skills")["from_here"] == "../base"
    made.rename(tmp_path / "there")
    DyLoRA_MoE.from_pretrained(tmp_path / "there" / "skills")
    rename_expert(tmp_path / "there" / "skills", "expert_0", "sql")


def test_a_base_that_is_gone_is_one_line_that_names_the_flag(made: Path, tmp_path: Path) -> None:
    (made / "base").rename(tmp_path / "elsewhere")
    for load in (DyLoRA_MoE.from_pretrained, lambda path: rename_expert(path, "expert_0", "sql")):
        with pytest.raises(CheckpointError, match=r"was in .*/here/base, which is not there any more; .*`base_model`"):
            load(made / "mixture")
    loaded = DyLoRA_MoE.from_pretrained(made / "mixture", str(tmp_path / "elsewhere"))
    assert loaded.base_name == str(tmp_path / "elsewhere")
    rename_expert(made / "mixture", "expert_0", "sql", str(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match=r"there is no folder '\./gone'; check `base_model`"):
        DyLoRA_MoE.from_pretrained(made / "mixture", "./gone")


def test_a_relative_path_of_an_older_mixture_is_not_asked_of_the_hub(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made / "mixture" / "dylo_moe.json"
    said = json.loads(file.read_text())
    said["base_model"] |= {"name": "./base", "from_here": None}
    file.write_text(json.dumps(said))
    monkeypatch.chdir(made)
    DyLoRA_MoE.from_pretrained("mixture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"was in \./base, which is not there any more"):
        DyLoRA_MoE.from_pretrained(made / "mixture")


def test_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    other = write_tiny_folder(tmp_path / "other", seed=3)
    with pytest.raises(CheckpointError, match="is another one"):
        DyLoRA_MoE.from_pretrained(made / "mixture", str(other))


def test_a_pissa_expert_is_still_one_after_loading(made: Path, tmp_path: Path) -> None:
    model = DyLoRA_MoE(str(made / "base"), 2, rank=2, init="pissa")
    model.save_pretrained(tmp_path / "pissa")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "pissa").train()
    assert loaded.num_trainable_parameters() == model.num_trainable_parameters()
    loaded(IDS, labels=IDS).loss.backward()
    for name, parameter in loaded.named_parameters():
        if ".lora_A." in name and parameter.grad is not None:
            assert not parameter.grad[2:].any()
    shutil.rmtree(tmp_path / "pissa")
