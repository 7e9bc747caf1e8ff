"""Tests of changing the experts of a checkpoint on the disk: the remaining ones compute the same."""

from pathlib import Path

import pytest
import torch

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import ExpertError
from dylo_moe.skills.expert_edits import (
    export_expert,
    list_experts,
    merge_experts,
    read_library,
    remove_expert,
    rename_expert,
)
from dylo_moe.skills.library import SkillLibrary, SkillRecord, save_with_skills
from tests.support.families import HIDDEN, mixture, tiny, token_ids
from tests.support.tiny_folder import write_tiny_folder

IDS = token_ids(2, 9)


def loaded(path: Path) -> DyLoRA_MoE:
    return DyLoRA_MoE.from_pretrained(path, tiny(dtype=torch.float32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a mixture of three mature experts of unequal ranks with a skill each, the first one with two."""
    model = mixture(routing="prefix:1", dtype=torch.float32, num_experts=2, mature=True)
    model.add_expert(rank=6, use_rslora=True)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.experts.parameters("expert_2"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.set_maturity()
    library = SkillLibrary(HIDDEN)
    for name, expert in (("a", 0), ("b", 1), ("c", 2), ("d", 0)):
        rows = torch.randn(20, HIDDEN, generator=generator)
        library.gate.learn(rows, expert)
        usage = {name: {one: 1 / 3 for one in model.experts.names}}
        entry = SkillRecord(name=name, expert=f"expert_{expert}", losses={"a": 1.0}, usage=usage)
        library.add(entry, rows, rows[:5], rows[:5])
    with torch.no_grad():
        model.router.gates[0].copy_(library.gate.weight())
    save_with_skills(model, library, tmp_path / "model")
    return tmp_path / "model"


def logits(model: DyLoRA_MoE, weights: list[float]) -> torch.Tensor:
    shares = torch.tensor(weights).expand(*IDS.shape, len(weights))
    with torch.no_grad():
        return model.eval()(IDS, routing_weights=shares).logits


def test_the_list_shows_the_experts_and_their_skills(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, listed = loaded(path), list_experts(path)
    assert [(one.name, one.rank, one.maturity) for one in listed] == [
        ("expert_0", 4, 1),
        ("expert_1", 4, 1),
        ("expert_2", 6, 1),
    ]
    assert [one.parameters for one in listed] == [model.experts.num_parameters(one.name) for one in listed]
    assert main(["experts", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "expert_2" in printed and "a, d" in printed and "mature" in printed
    assert "forgetting" not in printed, "not all losses were measured"


def test_forgetting_and_backward_transfer_are_shown_if_all_losses_were_measured(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, library = loaded(path), read_library(path)
    assert library is not None
    for number, skill in enumerate(library.skills):
        skill.losses = {name: 1.0 + 0.25 * number for name in library.names[: number + 1]}
    save_with_skills(model, library, path)
    assert main(["experts", str(path)]) == 0
    # a, b and c ended at 1.75, from 1.0, 1.25 and 1.5
    assert "forgetting +0.500, backward transfer -0.500 nats per token" in capsys.readouterr().out


def test_a_renamed_expert_is_the_same_expert(path: Path) -> None:
    with torch.no_grad():
        before = loaded(path)(IDS).logits
    rename_expert(path, "expert_1", "cpp")
    after = loaded(path)
    assert after.experts.names == ["expert_0", "cpp", "expert_2"]
    with torch.no_grad():
        assert torch.equal(after(IDS).logits, before)
    library = read_library(path)
    assert library is not None and library.skills[1].expert == "cpp" and "cpp" in library.skills[0].usage["a"]


def test_a_frozen_expert_stays_frozen_until_it_is_unfrozen(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", str(path), "--freeze", "expert_1"]) == 0
    assert "mature, frozen" in capsys.readouterr().out
    frozen = loaded(path)
    assert frozen.experts.frozen == {"expert_1"}
    assert not any(parameter.requires_grad for parameter in frozen.experts.parameters("expert_1"))
    frozen.save_pretrained(path.parent / "again")
    assert loaded(path.parent / "again").experts.frozen == {"expert_1"}
    assert main(["experts", str(path), "--unfreeze", "expert_1"]) == 0
    assert "frozen" not in capsys.readouterr().out and not loaded(path).experts.frozen


def test_an_expert_cannot_have_the_name_of_a_module(tmp_path: Path) -> None:
    base = write_tiny_folder(tmp_path / "base")
    DyLoRA_MoE(str(base), 2, rank=2, routing="prefix:1").save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "dylo_moe.json").read_bytes()
    for name in ("lm_head", "embed_tokens"):  # no expert adapts these, but PEFT would still confuse the names
        with pytest.raises(ExpertError, match="a module has that name"):
            rename_expert(tmp_path / "model", "expert_1", name)
    assert (tmp_path / "model" / "dylo_moe.json").read_bytes() == before
    rename_expert(tmp_path / "model", "expert_1", "cpp")
    assert DyLoRA_MoE.from_pretrained(tmp_path / "model").experts.names == ["expert_0", "cpp"]


def test_removing_an_expert_does_not_change_the_others(path: Path) -> None:
    before = logits(loaded(path), [0.3, 0.0, 0.7])
    remove_expert(path, "expert_1")
    after, library = loaded(path), read_library(path)
    assert after.experts.names == ["expert_0", "expert_2"]
    assert torch.allclose(logits(after, [0.3, 0.7]), before, atol=1e-5)
    assert library is not None and library.names == ["a", "c", "d"] and library.gate.num_experts == 2
    assert torch.allclose(after.router.gates[0].double(), library.gate.weight(), atol=1e-5)


def test_without_skills_the_router_keeps_the_columns_of_the_remaining_experts(tmp_path: Path) -> None:
    model = mixture(routing="per_layer", dtype=torch.float32, num_experts=3)
    model.save_pretrained(tmp_path / "model")
    before = [gate.clone() for gate in model.router.gates]
    remove_expert(tmp_path / "model", "expert_1")
    assert read_library(tmp_path / "model") is None
    for gate, old in zip(loaded(tmp_path / "model").router.gates, before, strict=True):
        assert torch.equal(gate, old[[0, 2]])


def test_a_merged_expert_adds_the_sum_of_both_updates(path: Path) -> None:
    model = loaded(path)
    # both at full weight, which routing weights that sum to 1 never give
    before = logits(model, [1.0, 0.0, 1.0])
    merge_experts(path, "expert_0", "expert_2")
    after, library = loaded(path), read_library(path)
    assert [(one.name, one.rank) for one in list_experts(path)] == [("expert_0", 10), ("expert_1", 4)]
    assert torch.allclose(logits(after, [1.0, 0.0]), before, atol=1e-5)
    assert library is not None and [skill.expert for skill in library.skills] == [
        "expert_0",
        "expert_1",
        *["expert_0"] * 2,
    ]
    assert library.skills[0].usage["a"]["expert_0"] == pytest.approx(2 / 3)


def test_a_merged_column_is_the_sum_of_both_columns(path: Path) -> None:
    before = read_library(path)
    merge_experts(path, "expert_0", "expert_2")
    after = read_library(path)
    assert before is not None and after is not None
    # the columns of a linear regression add up as its targets do
    assert torch.allclose(after.gate.solution()[0], before.gate.solution()[[0, 2]].sum(dim=0), atol=1e-9)


@pytest.mark.parametrize(
    "change", [("--rename", "expert_9=x"), ("--remove", "expert_9"), ("--merge", "expert_9,expert_0")]
)
def test_an_unknown_expert_is_named_and_the_checkpoint_unchanged(
    path: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (path / "dylo_moe.json").read_bytes()
    assert main(["experts", str(path), *change]) == 2
    assert "expert_9" in capsys.readouterr().err and (path / "dylo_moe.json").read_bytes() == before


def test_unusable_names_and_removing_the_only_expert_are_refused(path: Path) -> None:
    for name in ("expert_0", "q_proj", "a.b", "7"):
        with pytest.raises(ExpertError):
            rename_expert(path, "expert_1", name)
    remove_expert(path, "expert_0")
    remove_expert(path, "expert_1")
    with pytest.raises(ExpertError, match="only expert"):
        remove_expert(path, "expert_2")


@pytest.fixture
def with_shared(tmp_path: Path) -> Path:
    """Return a mixture of two mature experts and a shared one."""
    mixture(routing="prefix:1", dtype=torch.float32, num_experts=2, shared_rank=5, mature=True).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def test_a_shared_expert_is_listed_renamed_frozen_and_removed(
    with_shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [(one.name, one.rank, one.maturity) for one in list_experts(with_shared)][-1] == ("shared", 5, None)
    before = logits(loaded(with_shared), [0.2, 0.8])
    without = logits(loaded(with_shared), [0.2, 0.8, 0.0])
    rename_expert(with_shared, "shared", "common")
    assert main(["experts", str(with_shared), "--freeze", "common"]) == 0
    assert "shared, frozen" in capsys.readouterr().out
    model = loaded(with_shared)
    assert (model.experts.shared, model.experts.frozen) == ("common", {"common"})
    assert torch.equal(logits(model, [0.2, 0.8]), before)
    remove_expert(with_shared, "common")
    assert loaded(with_shared).experts.shared is None
    torch.testing.assert_close(logits(loaded(with_shared), [0.2, 0.8]), without)


def test_another_edit_keeps_the_shared_expert(with_shared: Path) -> None:
    alone = logits(loaded(with_shared), [0.0, 1.0])
    remove_expert(with_shared, "expert_0")
    torch.testing.assert_close(logits(loaded(with_shared), [1.0]), alone)


def test_a_shared_expert_cannot_be_merged_or_imported_over(with_shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="the shared expert 'shared' is always on, and cannot be merged"):
        merge_experts(with_shared, "expert_0", "shared")
    export_expert(with_shared, "expert_0", tmp_path / "shared")
    with pytest.raises(ExpertError, match="there is an expert 'shared' already"):
        loaded(with_shared).import_expert(tmp_path / "shared")
    loaded(with_shared).import_expert(tmp_path / "shared", "another")  # the remedy
