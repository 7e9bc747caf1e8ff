"""Layers that carry some of the experts: each routes among its own, compared with a slow reference in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.routing.balance import expert_load, load_balance_loss, updated_selection_bias
from dylo_moe.errors import ExpertError
from tests.support.families import FAMILIES, LAYERS, mixture, relative_error, tiny, token_ids

BLOCKS = [1, 2, 4]


def blocks_of(*, mature: bool = False, **options: object) -> DyLoRA_MoE:
    options = {"num_experts": 4, "experts_per_layer": BLOCKS, **options}
    return mixture("llama", "per_layer", mature=mature, **options)


def carried(model: DyLoRA_MoE) -> list[list[str]]:
    layers = model.experts.base_model.model.layers
    return [sorted(layer.self_attn.q_proj.r) if hasattr(layer.self_attn.q_proj, "r") else [] for layer in layers]


def test_each_block_of_layers_carries_its_experts() -> None:
    wanted = [["expert_0"], ["expert_0", "expert_1"], ["expert_0", "expert_1", "expert_2", "expert_3"]]
    assert carried(blocks_of()) == wanted


def test_blocks_are_of_about_equal_size_and_in_any_order() -> None:
    assert carried(mixture("llama", "per_layer", experts_per_layer=[3, 1]))[0] == ["expert_0", "expert_1", "expert_2"]
    assert [len(names) for names in carried(mixture("llama", "per_layer", experts_per_layer=[3, 1]))] == [3, 3, 1]
    assert [len(names) for names in carried(mixture("llama", "per_layer", experts_per_layer=[3]))] == [3, 3, 3]


def softmax_of(logits: Tensor, count: int, top_k: int | None, bias: Tensor) -> list[float]:
    """Return the weights of one token among the first ``count`` experts, in plain Python."""
    among = list(range(count))
    if top_k is not None:
        among = sorted(among, key=lambda expert: float(logits[expert] + bias[expert]), reverse=True)[:top_k]
    powers = {expert: float(logits[expert].exp()) for expert in among}
    return [powers.get(expert, 0.0) / sum(powers.values()) for expert in range(len(logits))]


@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
@torch.no_grad()
def test_each_layer_mixes_its_experts_as_the_reference_does(mature: bool) -> None:
    model = blocks_of(mature=mature)
    model.router.selection_bias.copy_(torch.linspace(-0.5, 0.5, 4).expand_as(model.router.selection_bias))
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        return lambda module, args, output: seen.update({key: (args[0], output)})

    for index, layer in enumerate(model.experts.base_model.model.layers):
        for name in ("q_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).register_forward_hook(keep((index, name)))
    recorded = model(token_ids(2, 7)).router_logits
    for (index, name), (x, got) in seen.items():
        module = getattr(model.experts.base_model.model.layers[index].self_attn, name)
        count = BLOCKS[index]
        logits = recorded[index]
        bias = model.router.selection_bias[index]
        wanted = module.base_layer(x)
        for row, position in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
            weights = softmax_of(logits[row, position], count, 2 if mature else None, bias)
            assert sum(weights) == pytest.approx(1)
            for expert in range(count):
                key = f"expert_{expert}"
                delta = module.lora_B[key].weight @ (module.lora_A[key].weight @ x[row, position])
                wanted[row, position] += weights[expert] * module.scaling[key] * delta
        assert relative_error(got, wanted) < 1e-12, (index, name)


@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
def test_generation_with_the_cache_routes_as_a_whole_forward_does(mature: bool) -> None:
    model = blocks_of(mature=mature)
    ids = token_ids(2, 5)
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for length in range(5, 10):
            assert torch.equal(model(made[:, :length]).logits[:, -1].argmax(dim=-1), made[:, length])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = token_ids(2, 7)

    def found(checkpointing: bool) -> dict[str, Tensor]:
        model = blocks_of().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, saving = found(False), found(True)
    assert plain.keys() == saving.keys() and any("gates" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_weights_sum_to_1_and_are_0_for_experts_that_a_layer_lacks() -> None:
    model = blocks_of().train()
    output = model(token_ids(2, 7), labels=token_ids(2, 7))
    torch.testing.assert_close(output.routing_weights.sum(dim=-1), torch.ones_like(output.routing_weights[..., 0]))
    for gate, count in enumerate(BLOCKS):
        assert (output.routing_weights[gate, ..., count:] == 0).all()
        assert (output.routing_weights[gate, ..., :count] > 0).all()
    assert torch.isfinite(output.loss) and torch.isfinite(output.z_loss)


def test_one_expert_alone_is_that_adapter_where_it_exists(tmp_path: Path) -> None:
    model = blocks_of()
    ids = token_ids(2, 7)
    for index, name in enumerate(model.experts.names):
        weights = torch.nn.functional.one_hot(torch.full((2, 7), index), 4).double()
        given = model(ids, routing_weights=weights).logits
        model.experts.export(name, tmp_path / name)
        plain = PeftModel.from_pretrained(tiny(), tmp_path / name).eval()
        assert relative_error(plain(ids).logits, given) < 1e-6
        model.experts.set_active(name)
        assert relative_error(model(ids).logits, given) < 1e-12, "among one expert, its weight is 1"
        model.experts.activate_all()


def test_it_survives_saving_and_a_later_expert_is_in_every_layer(tmp_path: Path) -> None:
    model = blocks_of(mature=True)
    ids = token_ids(2, 7)
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", tiny())
    loaded.router.double()
    assert carried(loaded) == carried(model)
    assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-6
    loaded.add_expert(rank=4)
    assert all("expert_4" in names for names in carried(loaded) if names)
    loaded.save_pretrained(tmp_path / "grown")
    grown = DyLoRA_MoE.from_pretrained(tmp_path / "grown", tiny())
    assert carried(grown) == carried(loaded)


def test_active_experts_are_routed_among_in_the_layers_that_have_them() -> None:
    model = blocks_of().train()
    model.experts.set_active(["expert_1", "expert_3"])
    output = model(token_ids(2, 7), labels=token_ids(2, 7))
    assert torch.isfinite(output.loss)
    assert (output.routing_weights[1, ..., 0] == 1).all(), "layer 1 has the first of the two alone"
    assert (output.routing_weights[2] > 0).all()


def test_losses_count_the_experts_that_a_gate_has() -> None:
    inf = torch.inf
    logits = torch.tensor(
        [[[[0.0, 0.0, -inf, -inf]] * 2], [[[0.0, 1.0, 2.0, -inf]] * 2], [[[1.0, -inf, -inf, -inf]] * 2]]
    )
    load = expert_load(logits, None, 2)
    torch.testing.assert_close(load, torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [2, 0, 0, 0]]))
    assert load_balance_loss(logits[:1], None, 2).item() == pytest.approx(1), "uniform over the two that there are"
    assert load_balance_loss(logits[2:], None, 2).item() == pytest.approx(1)
    among = torch.isfinite(logits[:, 0, 0])
    bias = updated_selection_bias(torch.zeros(3, 4), load, 0.5, among)
    torch.testing.assert_close(bias, torch.tensor([[0.0, 0, 0, 0], [0.5, -0.5, -0.5, 0], [0, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([1, 2], "numbers from 1 to the number of experts"),
        ([0, 3], "numbers from 1"),
        ([], "numbers from 1"),
        ([3] * (LAYERS + 1), rf"at most one number for each layer \({LAYERS}\), got {LAYERS + 1}"),
    ],
)
def test_impossible_blocks_are_refused(blocks: list[int], message: str) -> None:
    with pytest.raises(ExpertError, match=message):
        mixture("llama", "per_layer", experts_per_layer=blocks)


@pytest.mark.parametrize("routing", ["final", "prefix:1"])
def test_a_gate_that_layers_share_has_all_experts(routing: str) -> None:
    with pytest.raises(ExpertError, match=f"`experts_per_layer` needs `routing` per_layer, got {routing}"):
        mixture("llama", routing, experts_per_layer=[1, 3])


def adapted(family: str, target_modules: str) -> set[str]:
    model = mixture(family, "per_layer", num_experts=1, target_modules=target_modules)
    return {name for name, module in model.experts.base_model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_the_two_parts_of_all_linear_modules(family: str) -> None:
    attention, mlp, everything = (adapted(family, place) for place in ("attention", "mlp", "all-linear"))
    assert attention | mlp == everything
    assert not attention & mlp
    assert all("attn" in name or "attention" in name for name in attention)
    assert all(".mlp." in name for name in mlp)


def test_an_expert_added_later_finds_the_same_modules() -> None:
    model = mixture("gpt2", "per_layer", num_experts=1, target_modules="mlp")
    before = adapted("gpt2", "mlp")
    model.add_expert("later", target_modules="mlp")
    later = {
        name
        for name, module in model.experts.base_model.named_modules()
        if hasattr(module, "lora_A") and "later" in module.lora_A
    }
    assert later == before
