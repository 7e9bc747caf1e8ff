"""Experts of a checkpoint, changed on the disk: what is left computes what it should."""

from pathlib import Path

import pytest
import torch

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import ExpertError
from dylo_moe.skills.library import SkillEntry, SkillLibrary, save_with_skills
from dylo_moe.skills.lifecycle import library_of, list_experts, merge_experts, remove_expert, rename_expert
from families import HIDDEN, mixture, tiny, token_ids
from tiny_folder import write_tiny_folder

IDS = token_ids(2, 9)


def loaded(path: Path) -> DyLoRA_MoE:
    return DyLoRA_MoE.from_pretrained(path, tiny(dtype=torch.float32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three mature experts of unequal ranks, a skill each, and the first one a second skill."""
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
        entry = SkillEntry(name=name, expert=f"expert_{expert}", losses={"a": 1.0}, usage=usage)
        library.add(entry, rows, rows[:5], rows[:5])
    with torch.no_grad():
        model.router.gates[0].copy_(library.gate.weight())
    save_with_skills(model, library, tmp_path / "model")
    return tmp_path / "model"


def logits(model: DyLoRA_MoE, weights: list[float]) -> torch.Tensor:
    shares = torch.tensor(weights).expand(*IDS.shape, len(weights))
    with torch.no_grad():
        return model.eval()(IDS, routing_weights=shares).logits


def test_the_list_says_what_there_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_renamed_expert_is_the_same_expert(path: Path) -> None:
    with torch.no_grad():
        before = loaded(path)(IDS).logits
    rename_expert(path, "expert_1", "cpp")
    after = loaded(path)
    assert after.experts.names == ["expert_0", "cpp", "expert_2"]
    with torch.no_grad():
        assert torch.equal(after(IDS).logits, before)
    library = library_of(path)
    assert library is not None and library.skills[1].expert == "cpp" and "cpp" in library.skills[0].usage["a"]


def test_a_frozen_expert_stays_so_until_it_is_not(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", str(path), "--freeze", "expert_1"]) == 0
    assert "mature, frozen" in capsys.readouterr().out
    frozen = loaded(path)
    assert frozen.experts.frozen == {"expert_1"}
    assert not any(parameter.requires_grad for parameter in frozen.experts.parameters("expert_1"))
    frozen.save_pretrained(path.parent / "again")
    assert loaded(path.parent / "again").experts.frozen == {"expert_1"}
    assert main(["experts", str(path), "--unfreeze", "expert_1"]) == 0
    assert "frozen" not in capsys.readouterr().out and not loaded(path).experts.frozen


def test_an_expert_is_not_called_as_a_module_of_the_base(tmp_path: Path) -> None:
    base = write_tiny_folder(tmp_path / "base")
    DyLoRA_MoE(str(base), 2, rank=2, routing="prefix:1").save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "dylo_moe.json").read_bytes()
    for name in ("lm_head", "embed_tokens"):  # no expert is on these, and PEFT would still take one for the other
        with pytest.raises(ExpertError, match="a module has that name"):
            rename_expert(tmp_path / "model", "expert_1", name)
    assert (tmp_path / "model" / "dylo_moe.json").read_bytes() == before
    rename_expert(tmp_path / "model", "expert_1", "cpp")
    assert DyLoRA_MoE.from_pretrained(tmp_path / "model").experts.names == ["expert_0", "cpp"]


def test_without_a_removed_expert_the_others_are_as_they_were(path: Path) -> None:
    before = logits(loaded(path), [0.3, 0.0, 0.7])
    remove_expert(path, "expert_1")
    after, library = loaded(path), library_of(path)
    assert after.experts.names == ["expert_0", "expert_2"]
    assert torch.allclose(logits(after, [0.3, 0.7]), before, atol=1e-5)
    assert library is not None and library.names == ["a", "c", "d"] and library.gate.num_experts == 2
    assert torch.allclose(after.router.gates[0].double(), library.gate.weight(), atol=1e-5)


def test_without_skills_the_router_keeps_the_columns_of_those_that_stay(tmp_path: Path) -> None:
    model = mixture(routing="per_layer", dtype=torch.float32, num_experts=3)
    model.save_pretrained(tmp_path / "model")
    before = [gate.clone() for gate in model.router.gates]
    remove_expert(tmp_path / "model", "expert_1")
    assert library_of(tmp_path / "model") is None
    for gate, old in zip(loaded(tmp_path / "model").router.gates, before, strict=True):
        assert torch.equal(gate, old[[0, 2]])


def test_a_merged_expert_adds_what_both_added(path: Path) -> None:
    model = loaded(path)
    # both at full weight: the sum of what they add, which routing by shares never gives
    before = logits(model, [1.0, 0.0, 1.0])
    merge_experts(path, "expert_0", "expert_2")
    after, library = loaded(path), library_of(path)
    assert [(one.name, one.rank) for one in list_experts(path)] == [("expert_0", 10), ("expert_1", 4)]
    assert torch.allclose(logits(after, [1.0, 0.0]), before, atol=1e-5)
    assert library is not None and [skill.expert for skill in library.skills] == [
        "expert_0",
        "expert_1",
        *["expert_0"] * 2,
    ]
    assert library.skills[0].usage["a"]["expert_0"] == pytest.approx(2 / 3)


def test_a_merged_column_is_that_of_a_gate_that_was_taught_so(path: Path) -> None:
    before = library_of(path)
    merge_experts(path, "expert_0", "expert_2")
    after = library_of(path)
    assert before is not None and after is not None
    # targets add up, and so do the columns of a linear regression on them
    assert torch.allclose(after.gate.solution()[0], before.gate.solution()[[0, 2]].sum(dim=0), atol=1e-9)


@pytest.mark.parametrize(
    "change", [("--rename", "expert_9=x"), ("--remove", "expert_9"), ("--merge", "expert_9,expert_0")]
)
def test_an_unknown_expert_is_named_and_nothing_changes(
    path: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (path / "dylo_moe.json").read_bytes()
    assert main(["experts", str(path), *change]) == 2
    assert "expert_9" in capsys.readouterr().err and (path / "dylo_moe.json").read_bytes() == before


def test_names_that_cannot_be_are_refused(path: Path) -> None:
    for name in ("expert_0", "q_proj", "a.b", "7"):
        with pytest.raises(ExpertError):
            rename_expert(path, "expert_1", name)
    remove_expert(path, "expert_0")
    remove_expert(path, "expert_1")
    with pytest.raises(ExpertError, match="only expert"):
        remove_expert(path, "expert_2")
