"""A shared expert, which every token has at weight 1, and the expert scale, in all routing modes."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.losses import causal_lm_loss
from dylo_moe.errors import ExpertError, RoutingError
from tests.support.families import LAYERS, ROUTINGS, gradients, mixture, relative_error, tiny, token_ids

IDS = token_ids(2, 9)
EVERY_ROUTING = pytest.mark.parametrize("routing", ROUTINGS)
MERGEABLE = pytest.mark.parametrize("routing", [mode for mode in ROUTINGS if "base" not in mode and mode != "final"])
"""Routing modes whose router reads the same with the shared expert merged into the base."""


def shared_of(model: DyLoRA_MoE) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
    """Return ``A``, ``B`` and scaling of the shared expert, by the name of the base's module."""
    name = model.experts.shared
    return {
        path: (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for path, layer in model.experts.base_model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


def merged(model: DyLoRA_MoE, routing: str, **options: object) -> DyLoRA_MoE:
    """Return a mixture with the same routed experts and router on a base that has the shared update in its weights."""
    base = tiny()
    for path, (down, up, scaling) in shared_of(model).items():
        with torch.no_grad():
            base.get_submodule(path).weight.add_(scaling * up @ down)
    reference = DyLoRA_MoE(base, len(model.experts), rank=4, routing=routing, **options)
    routed = {name: value for name, value in model.state_dict().items() if "lora_" in name and ".shared." not in name}
    missing = reference.load_state_dict(routed, strict=False)
    assert not missing.unexpected_keys
    reference.router = reference.router.double()
    reference.router.load_state_dict(model.router.state_dict())
    reference.router.maturity[:] = model.router.maturity
    return reference.train(model.training)


@MERGEABLE
@pytest.mark.parametrize("mature", [False, True])
@pytest.mark.parametrize("experts", [3, 16])
def test_it_is_as_if_it_were_part_of_the_base(routing: str, mature: bool, experts: int) -> None:
    model = mixture(routing=routing, num_experts=experts, shared_rank=6, mature=mature)
    reference = merged(model, routing)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, reference(IDS).logits) < 1e-12
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for prompts in (IDS, IDS[:1]):
        assert torch.equal(model.generate(prompts, **options), reference.generate(prompts, **options))


@pytest.mark.parametrize("routing", ["final", "base_context:1"])
def test_after_a_pass_of_the_base_it_adds_its_update_to_the_weights_that_the_router_gave(routing: str) -> None:
    model = mixture(routing=routing, shared_rank=6)
    with torch.no_grad():
        output = model(IDS)
        wanted = merged(model, routing)(IDS, routing_weights=output.routing_weights[0]).logits
    assert output.routing_weights.shape[-1] == 3
    assert relative_error(output.logits, wanted) < 1e-12


@MERGEABLE
def test_gradients_are_those_of_a_base_with_its_update(routing: str) -> None:
    model = mixture(routing=routing, shared_rank=6).train()
    reference = merged(model, routing)
    reference.experts.base_model.requires_grad_(True)
    for one in (model, reference):
        one(IDS, labels=IDS).loss.backward()
    ours, theirs = gradients(model), gradients(reference)
    for name, gradient in ours.items():
        if ".shared." not in name:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12)
    for path, (down, up, scaling) in shared_of(model).items():
        of_weight = reference.experts.base_model.get_submodule(path).get_base_layer().weight.grad
        torch.testing.assert_close(down.grad, scaling * up.T @ of_weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(up.grad, scaling * of_weight @ down.T, rtol=1e-9, atol=1e-12)


@EVERY_ROUTING
def test_it_is_saved_loaded_and_frozen_like_any_expert(routing: str, tmp_path: Path) -> None:
    model = mixture(routing=routing, shared_rank=6, expert_scale="unit", mature=True)
    model.experts.freeze("shared")
    model.save_pretrained(tmp_path / "mixture")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", tiny())
    assert (again.experts.shared, again.experts.frozen) == ("shared", {"shared"})
    assert again.experts.names == model.experts.names
    assert again.router.expert_scale == "unit"
    again.router.double()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        model.router.gates[0].zero_()
        model.load_weights(tmp_path / "mixture")
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(parameter.requires_grad for parameter in again.experts.parameters("shared"))


def test_one_expert_is_that_one_and_the_shared_one_and_the_base_has_neither(tmp_path: Path) -> None:
    model = mixture(shared_rank=6)
    for name in ("expert_1", "shared"):
        model.experts.export(name, tmp_path / name)
    with torch.no_grad():
        rows = model(IDS, adapter_names=["expert_1", "__base__"]).logits
        base = tiny()
        assert relative_error(rows[1], base(IDS).logits[1]) < 1e-12
        plain = PeftModel.from_pretrained(base, tmp_path / "expert_1", adapter_name="expert_1")
        plain.load_adapter(tmp_path / "shared", "shared")
        plain.base_model.set_adapter(["expert_1", "shared"])
        assert relative_error(rows[0], plain(IDS).logits[0]) < 1e-12
        model.experts.set_active("expert_1")
        assert relative_error(model(IDS).logits[0], rows[0]) < 1e-12


def test_given_weights_may_have_a_column_for_it() -> None:
    model = mixture(shared_rank=6)
    weights = torch.rand(2, 9, 3, dtype=torch.float64)
    ones, zeros = weights.new_ones(2, 9, 1), weights.new_zeros(2, 9, 1)
    with torch.no_grad():
        given = model(IDS, routing_weights=weights).logits
        assert torch.equal(model(IDS, routing_weights=torch.cat([weights, ones], dim=-1)).logits, given)
        alone = model(IDS, routing_weights=torch.cat([weights * 0, zeros], dim=-1)).logits
        assert relative_error(alone, tiny()(IDS).logits) < 1e-12


def test_its_place_and_its_name_are_its_own() -> None:
    model = mixture(routing="per_layer", shared_rank=6, experts_per_layer=[1, 3])
    assert len(shared_of(model)) == 4 * LAYERS
    assert model.experts.adapters == ["expert_0", "expert_1", "expert_2", "shared"]
    assert model.router.num_experts == 3
    with pytest.raises(ExpertError, match="always active"):
        model.experts.set_active(["expert_0", "shared"])
    with pytest.raises(ExpertError, match="always active"):
        model.set_maturity(1, ["shared"])
    with pytest.raises(ExpertError, match="has the shared expert 'shared' already"):
        model.experts.create(shared=True)
    with pytest.raises(ExpertError, match="there is an expert 'shared' already"):
        model.add_expert("shared")
    assert model.add_expert() == "expert_3"
    assert model.router.num_experts == 4
    assert copy.deepcopy(model)(IDS).logits.shape == model(IDS).logits.shape


# --- the expert scale ------------------------------------------------------------------------------------------------


def plain_lora(model: DyLoRA_MoE) -> PeftModel:
    """Return PEFT's LoRA that holds the experts of a mixture side by side, the shared one last."""
    ranks = [model.experts[name].r for name in model.experts.adapters]
    scaling = 2.0
    config = LoraConfig(
        r=sum(ranks), lora_alpha=scaling * sum(ranks), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    plain = get_peft_model(tiny(), config)
    for path, layer in model.experts.base_model.named_modules():
        if hasattr(layer, "lora_A"):
            whole = plain.base_model.model.get_submodule(path)
            names = model.experts.adapters
            whole.lora_A["default"].weight.data = torch.cat([layer.lora_A[name].weight for name in names]).detach()
            whole.lora_B["default"].weight.data = torch.cat(
                [layer.lora_B[name].weight for name in names], dim=1
            ).detach()
    return plain.double()


@pytest.mark.parametrize("routing", ["per_layer", "final", "prefix:0", "context:0"])
@pytest.mark.parametrize("shared_rank", [0, 6])
def test_with_unit_scale_the_first_step_is_that_of_one_lora_of_all_ranks(routing: str, shared_rank: int) -> None:
    model = DyLoRA_MoE(tiny(), 4, rank=4, routing=routing, expert_scale="unit", shared_rank=shared_rank).train()
    for gate in model.router.gates:  # a router that prefers nobody
        gate.data.zero_()
    plain = plain_lora(model)
    for one in (model, plain):
        one.double()
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1) for one in (model, plain)]
    for step in range(2):
        ours, theirs = model(IDS, labels=IDS), plain(IDS, labels=IDS)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-9, atol=1e-10)
        loss = causal_lm_loss(theirs.logits, IDS)  # transformers' own is in float32
        torch.testing.assert_close(ours.lm_loss, loss, rtol=1e-9, atol=1e-10)
        ours.lm_loss.backward()
        loss.backward()
        if step:
            break
        for path, layer in plain.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                own = model.experts.base_model.get_submodule(path)
                wanted = layer.lora_B["default"].weight.grad
                got = torch.cat([own.lora_B[name].weight.grad for name in model.experts.adapters], dim=1)
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_unit_scale_makes_weights_sum_to_the_number_of_experts_that_are_mixed() -> None:
    dense = mixture(routing="prefix:1", num_experts=4, expert_scale="unit")
    sums = dense(IDS).routing_weights.sum(dim=-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 4))
    dense.set_maturity()
    sums = dense(IDS).routing_weights.sum(dim=-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2))
    dense.router.top_k = 1
    top1 = dense(IDS).routing_weights
    assert torch.equal(top1.sum(dim=-1), torch.ones_like(top1[..., 0]))
    with pytest.raises(RoutingError, match=r"`expert_scale` must be sum_to_one or unit, got 'one'"):
        mixture(expert_scale="one")


def test_sparse_training_mixes_and_trains_the_best_experts_alone() -> None:
    model = mixture(routing="prefix:1", num_experts=8, top_k=1).train()
    model.router.sparse_training = True
    output = model(IDS[:1, :4], labels=IDS[:1, :4])
    chosen = output.routing_weights.flatten(0, -2).sum(dim=0) > 0
    assert 0 < chosen.sum() < 8
    output.loss.backward()
    for name, used in zip(model.experts.names, chosen.tolist(), strict=True):
        moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.experts.parameters(name))
        assert moved == used
