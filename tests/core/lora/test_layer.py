"""The fused mixture against a plain loop over experts, and the state that routed layers share."""

import copy
from collections.abc import Sequence

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from dylo_moe import enable_routing
from dylo_moe.core.lora.ops import dense_lora_delta
from dylo_moe.core.lora.state import RoutingState, Scope
from dylo_moe.errors import RoutingError
from tests.support.families import (
    PAD,
    TIED,
    VOCABULARY,
    enable_checkpointing,
    gradients,
    relative_error,
    stir,
    tiny,
    token_ids,
)

RANKS = (1, 8, 3, 5)
SCALINGS = (2.0, 0.3, 1.1, -1.7)  # not all of them exact in float32
IN, OUT = 19, 23
BF16_ERROR = 0.02
"""Relative error allowed in bfloat16: two matmuls on inputs of 8 significant bits, each of error 2**-8 or less."""


def inputs(leading: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "x": random(*leading, IN),
        "a": [random(rank, IN) for rank in RANKS],
        "b": [random(OUT, rank) for rank in RANKS],
        "weights": random(*leading, len(RANKS)),
    }


def loop(x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor) -> Tensor:
    """One expert after the other and one matrix after the other, in float64."""
    total = torch.zeros(*x.shape[:-1], OUT, dtype=torch.float64)
    for expert, scaling in enumerate(SCALINGS):
        delta = (x.double() @ a[expert].double().T) @ b[expert].double().T
        total = total + weights[..., expert, None].double() * scaling * delta
    return total


def flat_gradients(output: Tensor, tensors: dict[str, Tensor | list[Tensor]], direction: Tensor) -> list[Tensor]:
    leaves = [tensors["x"], *tensors["a"], *tensors["b"], tensors["weights"]]
    return list(torch.autograd.grad(output, leaves, direction.to(output.dtype)))


def fused(x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor) -> Tensor:
    return dense_lora_delta(x, a, b, SCALINGS, weights)


@pytest.mark.parametrize("leading", [(2, 7), (1, 1), (11,), (2, 3, 4)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, BF16_ERROR)],
    ids=["float64", "float32", "bfloat16"],
)
def test_fused_equals_loop(leading: tuple[int, ...], seed: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(leading, seed, dtype)
    got, wanted = fused(**tensors), loop(**tensors)
    assert got.dtype == dtype
    assert relative_error(got.double(), wanted) < tolerance
    direction = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    pairs = zip(
        flat_gradients(got, tensors, direction), flat_gradients(wanted, tensors, direction.double()), strict=True
    )
    for ours, theirs in pairs:
        assert relative_error(ours.double(), theirs.double()) < tolerance


def test_float32_weights_leave_the_output_in_the_dtype_of_x() -> None:
    tensors = inputs((2, 5), 0, torch.bfloat16)
    weights = tensors.pop("weights").detach().float()
    assert relative_error(fused(**tensors, weights=weights).double(), loop(**tensors, weights=weights)) < BF16_ERROR
    assert fused(**tensors, weights=weights).dtype == torch.bfloat16


def test_weights_of_one_row_serve_the_whole_batch() -> None:
    tensors = inputs((3, 5), 0)
    row = tensors.pop("weights")[:1]
    assert relative_error(fused(**tensors, weights=row), loop(**tensors, weights=row.expand(3, -1, -1))) < 1e-10


def test_experts_share_one_dropout_mask() -> None:
    tensors = inputs((2, 5), 0)
    dropout = nn.Dropout(0.5)
    torch.manual_seed(1)
    got = dense_lora_delta(tensors["x"], tensors["a"], tensors["b"], SCALINGS, tensors["weights"], dropout)
    torch.manual_seed(1)
    assert relative_error(got, loop(**{**tensors, "x": dropout(tensors["x"])})) < 1e-10


def lora_model(family: str = "llama", *, names: Sequence[str] = ("first", "second"), **options: object) -> PeftModel:
    config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    torch.manual_seed(7)
    model = get_peft_model(tiny(family, dtype=torch.float32), LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**config, "r": 6}))
    stir(model)
    model.base_model.set_adapter(list(names))
    return model.eval()


def weights_for(ids: Tensor, columns: int = 2) -> Tensor:
    return torch.rand(*ids.shape, columns, generator=torch.Generator().manual_seed(2))


IDS = token_ids(2, 6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.rand(2, 6, 3), "3 columns, but 2 adapters are active: first, second"),
        (torch.rand(2, 6, 1), "1 columns, but 2 adapters are active: first, second"),
        (torch.rand(2, 5, 2), r"`routing_weights` are \(2, 5, 2\), but the hidden states are \(2, 6, 32\)"),
        (torch.rand(3, 6, 2), r"`routing_weights` are \(3, 6, 2\), but the hidden states are \(2, 6, 32\)"),
        (torch.rand(6, 2), r"must be a tensor \(batch, seq, num_active_experts\), got \(6, 2\)"),
        ([0.5, 0.5], r"must be a tensor \(batch, seq, num_active_experts\), got list"),
    ],
    ids=["too many columns", "too few columns", "other length", "other batch", "two dimensions", "a list"],
)
def test_weights_that_do_not_fit_are_refused(weights: object, message: str) -> None:
    model = lora_model()
    state = enable_routing(model)
    before = model(IDS).logits
    with pytest.raises(RoutingError, match=message) as refused:
        model(IDS, routing_weights=weights)
    assert "\n" not in str(refused.value)
    assert (state.call, state.scope) == (None, Scope())
    assert torch.equal(model(IDS).logits, before)


def test_merged_adapters_are_refused_and_unmerging_helps() -> None:
    model = lora_model()
    enable_routing(model)
    wanted = model(IDS, routing_weights=weights_for(IDS)).logits
    model.merge_adapter(["second"])
    with pytest.raises(RoutingError, match=r"adapters \['second'\] are merged .* call unmerge_adapter\(\) first"):
        model(IDS, routing_weights=weights_for(IDS))
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS, routing_weights=weights_for(IDS)).logits, wanted)


def test_an_exception_in_the_base_model_leaves_no_weights_behind() -> None:
    model = lora_model()
    state = enable_routing(model)
    before = model(IDS).logits
    with pytest.raises(IndexError):
        model(torch.full_like(IDS, VOCABULARY), routing_weights=weights_for(IDS))
    assert (state.call, state.scope) == (None, Scope())
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "'first' uses DoraLinearVariant at .*; only plain LoRA and rsLoRA can be routed"),
        (
            {"family": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
            "lora_bias is set at .*; train the adapter with lora_bias=False",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "embed_tokens is adapted by peft.tuners.lora.layer.Embedding; only LoRA on linear",
        ),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            "q_proj is adapted by peft.tuners.lora.layer.ParamWrapper",
        ),
    ],
    ids=["dora", "lora_bias", "embedding", "parameter"],
)
@pytest.mark.filterwarnings(TIED)
def test_layers_that_cannot_be_routed_are_refused(options: dict[str, object], message: str) -> None:
    model = lora_model(names=["first"], **options)
    before = model(IDS).logits
    with pytest.raises(RoutingError, match=message):
        enable_routing(model)
    assert torch.equal(model(IDS).logits, before)


def test_a_model_without_lora_layers_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(RoutingError, match="needs a model with LoRA adapters, and PeftModelForCausalLM has none"):
        enable_routing(get_peft_model(tiny(), config))


def test_enabling_twice_shares_one_state_and_routes_new_adapters() -> None:
    model = lora_model()
    state = enable_routing(model)
    wanted = model(IDS, routing_weights=weights_for(IDS)).logits
    targets = ["q_proj", "up_proj"]
    model.add_adapter("third", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    assert enable_routing(model) is state
    model.base_model.set_adapter(["first", "second", "third"])
    got = model(IDS, routing_weights=torch.cat([weights_for(IDS), torch.ones(2, 6, 1)], dim=-1)).logits
    torch.testing.assert_close(got, wanted, msg="a new adapter changes nothing while its B is zero")
    stir(model)
    third = model(IDS, routing_weights=torch.tensor([0.0, 0.0, 1.0]).expand(2, 6, 3)).logits
    model.set_adapter("third")
    torch.testing.assert_close(third, model(IDS).logits)


def test_rslora_scaling_is_kept() -> None:
    plain = lora_model(use_rslora=True, lora_alpha=4)
    routed = copy.deepcopy(plain)
    enable_routing(routed)
    plain.set_adapter("second")
    got = routed(IDS, routing_weights=torch.tensor([0.0, 1.0]).expand(2, 6, 2)).logits
    torch.testing.assert_close(got, plain(IDS).logits)


def test_scopes_nest_and_survive_exceptions() -> None:
    state = RoutingState()
    weights = torch.rand(1, 1, 1)
    with pytest.raises(KeyError), state.scoped(weights=weights), state.scoped(base_only=True):
        assert state.scope == Scope(base_only=True, weights=weights)
        raise KeyError
    assert state.scope == Scope()


def test_a_copy_has_a_state_of_its_own() -> None:
    model = lora_model()
    state = enable_routing(model)
    twin = copy.deepcopy(model)
    assert enable_routing(twin) is not state
    mixed = model(IDS, routing_weights=weights_for(IDS)).logits
    with state.scoped(base_only=True):
        assert torch.equal(twin(IDS, routing_weights=weights_for(IDS)).logits, mixed)
        assert not torch.equal(model(IDS).logits, mixed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_on_plain_peft_keeps_every_gradient(reentrant: bool) -> None:
    outcomes = []
    for checkpointing in (False, True):
        model = lora_model().train()
        enable_routing(model)
        model.enable_input_require_grads()
        if checkpointing:
            enable_checkpointing(model.get_base_model(), use_reentrant=reentrant)
        weights = weights_for(IDS).requires_grad_()
        loss = model(IDS, routing_weights=weights, labels=IDS.masked_fill(IDS == PAD, -100), use_cache=False).loss
        loss.backward()
        outcomes.append({**gradients(model), "routing_weights": weights.grad})
    plain, checkpointed = outcomes
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    for name, gradient in plain.items():
        assert gradient is not None and (gradient != 0).any(), f"{name} got no gradient at all"
        assert checkpointed[name] is not None, f"{name} lost its gradient under gradient checkpointing"
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# --- what layers share, and what they may overwrite -------------------------------------------------------------------


class Crossed(nn.Module):
    """Layers with the names of siblings that read different tensors, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, OUT, bias=False).double() for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.q_proj(x), self.k_proj(y), self.v_proj(x), self.q_proj(y), self.q_proj(x)])


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "k_proj"]])
def test_siblings_with_different_inputs_compute_for_themselves(targets: list[str]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Crossed(), LoraConfig(r=4, target_modules=targets), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    model.double()
    stir(model)
    model.base_model.set_adapter(["first", "second"])
    state = enable_routing(model)
    x, y = torch.randn(2, 2, 5, IN, dtype=torch.float64)
    routing = torch.rand(2, 5, 2, dtype=torch.float64)
    wanted = []
    for layer, fed in zip("qkvqq", (x, y, x, y, x), strict=True):
        module = getattr(model.base_model.model, f"{layer}_proj")
        result = (module.base_layer if hasattr(module, "base_layer") else module)(fed)
        for column, name in enumerate(getattr(module, "lora_A", {})):
            delta = fed @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T
            result = result + routing[..., column, None] * module.scaling[name] * delta
        wanted.append(result)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert relative_error(model(x, y, routing_weights=routing), torch.stack(wanted)) < 1e-12
    assert state.call is None, "nothing may be kept alive by a forward that is over"


@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_on_a_base_layer_keeps_the_output_of_that_layer(grad: bool) -> None:
    model = lora_model()
    enable_routing(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept: list[tuple[Tensor, Tensor]] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append((output, output.detach().clone())))
    with torch.set_grad_enabled(grad):
        model(IDS, routing_weights=weights_for(IDS))
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("change", ["write", "data", "parameter"])
def test_no_forward_uses_outdated_weights(change: str) -> None:
    model = lora_model()
    enable_routing(model)
    w = weights_for(IDS)
    with torch.no_grad():
        before = model(IDS, routing_weights=w).logits
        for side in ("lora_A", "lora_B"):
            modules = getattr(model.base_model.model.model.layers[1].self_attn.q_proj, side)
            parameter = modules["second"].weight
            if change == "write":
                parameter.mul_(-2)
            elif change == "data":
                parameter.data.mul_(-2)
            else:
                modules["second"].weight = nn.Parameter(parameter * -2)
            after = model(IDS, routing_weights=w).logits
            assert relative_error(after, before) > 1e-3
            assert relative_error(after, copy.deepcopy(model)(IDS, routing_weights=w).logits) < 1e-5
            before = after


def test_adapters_of_another_kind_are_refused_and_not_ignored() -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, target_modules=["q_proj"], total_step=10)
    with pytest.raises(RoutingError, match=r"is adapted by peft.tuners.adalora.layer.SVDLinear; only LoRA on linear"):
        enable_routing(get_peft_model(tiny(), config))


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    """As X-LoRA replaces it, which would then ignore the weights."""
    model = lora_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(RoutingError, match=r"the forward of .*q_proj was replaced, by another way to mix adapters"):
        enable_routing(model)


def test_ranks_are_those_of_the_matrices() -> None:
    model = lora_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for side, cut in (("lora_A", lambda weight: weight[:2]), ("lora_B", lambda weight: weight[:, :2])):
            module = getattr(layer, side)["second"]
            module.weight = nn.Parameter(cut(module.weight).clone())
    enable_routing(model)
    got = model(IDS, routing_weights=torch.tensor([0.0, 1.0]).expand(2, 6, 2)).logits
    model.set_adapter("second")
    torch.testing.assert_close(got, model(IDS).logits)
