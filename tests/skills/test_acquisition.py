"""Tests of a tiny model that acquires skills whose texts use different parts of the vocabulary."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import CheckpointError, ExpertError, RoutingError
from dylo_moe.skills.acquisition import SkillData, acquire_skill, extract_features
from dylo_moe.skills.expert_edits import merge_experts, remove_expert
from dylo_moe.skills.features import base_features
from dylo_moe.skills.library import SkillLibrary, save_with_skills
from tests.support.families import HIDDEN, VOCABULARY, mixture, padded, stir, tiny

ROUTINGS = ("context:1", "prefix:1", "final")


def batches(low: int, high: int, count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1000 * seed + low)
    rows = [torch.randint(low, high, (24 + index % 5,), generator=generator) for index in range(count)]
    made = [padded(rows[start : start + 8], "right") for start in range(0, count, 8)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in made]


def skill(name: str, low: int, high: int) -> SkillData:
    return SkillData(name, batches(low, high), batches(low, high, seed=1), rows=24)


LOW, MIDDLE, HIGH = (2, 8), (24, 30), (50, VOCABULARY)


def new_model(routing: str = "context:1") -> tuple[DyLoRA_MoE, SkillLibrary]:
    model = mixture(routing=routing, dtype=torch.float32, num_experts=1)
    return model, SkillLibrary(HIDDEN)


def learn(model: DyLoRA_MoE, library: SkillLibrary, data: SkillData, seed: int = 5, extend: bool | None = None) -> str:
    def train(expert: str) -> bool:
        assert model.experts.active == [expert]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(f".{expert}." in name for name in trained)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.experts.parameters(expert):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return True

    learned = acquire_skill(model, library, data, train, extend=extend, rank=4)
    assert learned is not None
    return learned.entry.expert


@pytest.mark.parametrize("routing", ROUTINGS)
def test_features_are_the_input_of_the_router_and_no_expert_changes_them(routing: str) -> None:
    model = mixture(routing=routing, dtype=torch.float32)
    (batch, *_) = batches(*LOW, count=8)
    features = base_features(model, **batch)
    with torch.no_grad():
        logits = model(**batch).router_logits[0]
    real = batch["attention_mask"].bool()
    assert torch.allclose((features.routed @ model.router.gates[0].T)[real], logits[real], rtol=1e-4, atol=1e-4)
    stir(model, seed=77)
    assert torch.equal(base_features(model, **batch).last, features.last)


def test_padding_does_not_change_the_features() -> None:
    model, _ = new_model()
    row = torch.arange(2, 9)
    (alone, alone_mask), (wide, wide_mask) = padded([row], "right"), padded([row, torch.arange(2, 30)], "right")
    one = extract_features(model, [{"input_ids": alone, "attention_mask": alone_mask}])
    both = extract_features(model, [{"input_ids": wide, "attention_mask": wide_mask}])
    assert torch.allclose(one.embeddings[0], both.embeddings[0], atol=1e-5)
    assert both.example.tolist() == [0] * 7 + [1] * 28 and len(both.tokens) == 35


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_new_skill_gets_an_expert_and_a_known_one_extends_it(routing: str) -> None:
    model, library = new_model(routing)
    assert learn(model, library, skill("low", *LOW)) == "expert_0"
    assert learn(model, library, skill("high", *HIGH)) == "expert_1"
    assert learn(model, library, SkillData("low too", batches(*LOW, seed=2), batches(*LOW, seed=3))) == "expert_0"
    assert [entry.extended for entry in library.skills] == [False, False, True]
    assert model.experts.names == ["expert_0", "expert_1"] and model.router.maturity == [1, 1]
    for data, expert in ((LOW, 0), (HIGH, 1)):
        logits = extract_features(model, batches(*data, seed=4)).tokens @ model.router.gates[0].T
        # single tokens of a random model hold little about their skill; the mean over the context holds more
        assert (logits.argmax(dim=1) == expert).float().mean() > (0.95 if routing == "context:1" else 0.8)


def test_rows_routed_to_old_experts_are_unchanged_by_a_new_one() -> None:
    model, library = new_model()
    learn(model, library, skill("low", *LOW))
    learn(model, library, skill("high", *HIGH))
    old = {name: [p.clone() for p in model.experts.parameters(name)] for name in model.experts.names}
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name and "router" not in name}
    (batch, *_) = batches(*LOW, count=8, seed=6)
    with torch.no_grad():
        before = model(**batch)
        learn(model, library, skill("middle", *MIDDLE))
        after = model.eval()(**batch)
    assert all(
        torch.equal(one, other)
        for name in old
        for one, other in zip(old[name], model.experts.parameters(name), strict=True)
    )
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    same = (after.routing_weights[0].argmax(-1) == before.routing_weights[0].argmax(-1)).all(dim=1)
    assert same.sum() >= 6, "this test needs rows that still go to the old experts"
    real = batch["attention_mask"].bool() & same[:, None]
    # one-hot weights add nothing of other experts
    assert set(after.routing_weights.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(after.logits[real], before.logits[real], rtol=1e-5, atol=1e-5)


def test_model_and_skills_are_saved_together_and_continue(tmp_path: Path) -> None:
    model, library = new_model()
    learn(model, library, skill("low", *LOW))
    save_with_skills(model, library, tmp_path / "model")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "model", tiny(dtype=torch.float32))
    known = SkillLibrary.load(tmp_path / "model", again.experts.names)
    assert known.skills == library.skills and torch.equal(known.embeddings(), library.embeddings())
    for one, its_library in ((model, library), (again, known)):
        torch.manual_seed(3)
        learn(one, its_library, skill("high", *HIGH))
    assert torch.equal(model.router.gates[0], again.router.gates[0])
    (batch, *_) = batches(*HIGH, count=8)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    seen = extract_features(model, batches(*HIGH, seed=8))
    assert library.judge(seen.embeddings, seen.routed).nearest == "high"


def test_a_frozen_expert_is_not_extended() -> None:
    model, library = new_model()
    learn(model, library, skill("low", *LOW))
    model.experts.freeze("expert_0")
    again = SkillData("low too", batches(*LOW, seed=2), batches(*LOW, seed=3))
    with pytest.raises(ExpertError, match="`extend` must not be set where the nearest expert, 'expert_0'"):
        acquire_skill(model, library, again, lambda expert: True, extend=True)
    assert learn(model, library, again) == "expert_1"
    assert model.experts.frozen == {"expert_0"}
    model.experts.unfreeze("expert_0")
    third = SkillData("low three", batches(*LOW, seed=6), batches(*LOW, seed=7))
    assert learn(model, library, third) in ("expert_0", "expert_1")


@pytest.mark.parametrize("change", ["remove", "merge"])
def test_the_stream_continues_after_a_removal_and_after_a_merge(change: str, tmp_path: Path) -> None:
    model, library = new_model()
    for name, (low, high) in {"low": LOW, "middle": MIDDLE, "high": HIGH}.items():
        learn(model, library, skill(name, low, high), extend=False)
    save_with_skills(model, library, tmp_path / "model")
    if change == "remove":
        remove_expert(tmp_path / "model", "expert_1")
    else:
        merge_experts(tmp_path / "model", "expert_0", "expert_1")
    model = DyLoRA_MoE.from_pretrained(tmp_path / "model", tiny(dtype=torch.float32))
    library = SkillLibrary.load(tmp_path / "model", model.experts.names)
    assert model.experts.names == ["expert_0", "expert_2"] and library.gate.num_experts == 2
    assert learn(model, library, skill("next", 10, 16), extend=False) == "expert_3"
    save_with_skills(model, library, tmp_path / "model")
    again = SkillLibrary.load(tmp_path / "model", ["expert_0", "expert_2", "expert_3"])
    kept = ["low", "high"] if change == "remove" else ["low", "middle", "high"]
    assert again.names == [*kept, "next"] and again.expert_of("next") == "expert_3"
    for data, column in ((HIGH, 1), ((10, 16), 2)):
        logits = extract_features(model, batches(*data, seed=4)).tokens @ model.router.gates[0].T
        assert (logits.argmax(dim=1) == column).float().mean() > 0.9


def test_stopped_training_does_not_change_the_library() -> None:
    model, library = new_model()
    assert acquire_skill(model, library, skill("low", *LOW), lambda expert: False) is None
    assert library.names == [] and library.gate.num_experts == 0


def test_an_unusable_skill_model_or_library_is_refused(tmp_path: Path) -> None:
    model, library = new_model()
    learn(model, library, skill("low", *LOW))
    with pytest.raises(ExpertError, match="already"):
        learn(model, library, skill("low", *LOW))
    drifting = mixture(routing="per_layer", dtype=torch.float32, num_experts=1)
    with pytest.raises(RoutingError, match="per_layer"):
        learn(drifting, SkillLibrary(HIDDEN), skill("low", *LOW))
    with pytest.raises(ExpertError, match="begin with one expert"):
        learn(mixture(routing="final", dtype=torch.float32), SkillLibrary(HIDDEN), skill("low", *LOW))
    model.save_pretrained(tmp_path / "no_skills")
    with pytest.raises(CheckpointError, match="no skills"):
        SkillLibrary.load(tmp_path / "no_skills")
    save_with_skills(model, library, tmp_path / "model")
    (tmp_path / "model" / "skills.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SkillLibrary.load(tmp_path / "model")
