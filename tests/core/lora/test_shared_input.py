"""The whole mixture by its fast paths, sparse and decoding, against the dense product that training uses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.lora import layer as layer_mixer
from dylo_moe.core.lora import shared_input
from tests.support.families import CONFIGS, ROUTINGS, cache_of, mixture, relative_error, stir, token_ids

ONE_GATE = [routing for routing in ROUTINGS if routing != "per_layer"]
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.08)]
"""Relative errors of logits; in bfloat16 those of three layers, each rounded to 8 significant bits many times."""


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("routing", ONE_GATE)
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (3, 2), (14, 1), (14, 2)])
@pytest.mark.parametrize("shape", [(3, 9), (2, 2), (1, 1)])
def test_sparse_routing_equals_the_same_weights_by_the_dense_product(
    shape: tuple[int, int], experts: int, top_k: int, routing: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = mixture(routing=routing, dtype=dtype, mature=True, num_experts=experts, top_k=top_k)
    ids = token_ids(*shape)
    with torch.no_grad():
        sparse = model(ids, use_cache=False)
        assert (sparse.routing_weights > 0).sum() == ids.numel() * top_k
        dense = model(ids, use_cache=False, routing_weights=sparse.routing_weights[0])
    assert relative_error(sparse.logits.double(), dense.logits.double()) < tolerance


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Record the number of matrices in each call of a function that the layers use."""
    calls: list[int] = []
    module = layer_mixer if hasattr(layer_mixer, name) else shared_input
    real = getattr(module, name)

    def recorded(*args: object, **options: object) -> object:
        calls.append(len(args[0]))
        return real(*args, **options)

    monkeypatch.setattr(module, name, recorded)
    return calls


@pytest.mark.parametrize(("experts", "sparse"), [(3, False), (14, True)])
def test_many_experts_are_not_all_computed(monkeypatch: pytest.MonkeyPatch, experts: int, sparse: bool) -> None:
    model = mixture(routing="prefix:1", dtype=torch.float32, mature=True, num_experts=experts, top_k=2)
    downs, ups, stacks = (spy(monkeypatch, name) for name in ("sparse_down", "sparse_up", "concat_rows"))
    with torch.no_grad():
        model(token_ids(3, 9), use_cache=False)
    sparse = sparse and hasattr(F, "grouped_mm")  # torch 2.9 computes them all
    assert (len(downs), len(ups), len(stacks)) == ((4, 8, 0) if sparse else (0, 0, 4)), (
        "in each of two layers down twice, for q, k and v together and for o, and up for each"
    )


def test_a_layer_that_cannot_be_sparse_takes_no_sparse_part_of_its_siblings() -> None:
    # keys and values of 6 features: rows of 24 bytes, which grouped products do not take; queries of 24 features
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "head_dim": 6, "num_key_value_heads": 1})
    torch.manual_seed(0)
    model = DyLoRA_MoE(LlamaForCausalLM(config).eval(), 14, rank=4, routing="prefix:1", top_k=2).eval()
    stir(model)
    model.set_maturity()
    ids = token_ids(3, 9)
    with torch.no_grad():
        sparse = model(ids, use_cache=False)
        dense = model(ids, use_cache=False, routing_weights=sparse.routing_weights[0])
    assert relative_error(sparse.logits, dense.logits) < 1e-4


@pytest.mark.parametrize("grad", [True, False])
def test_layers_with_a_shared_input_share_one_product(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    model = mixture(routing="prefix:1")
    stacks = spy(monkeypatch, "concat_rows")
    with torch.set_grad_enabled(grad):
        model(token_ids(2, 5))
    assert stacks == [9, 3, 9, 3], "three experts of q, k and v together, then of o, in two layers"


def test_the_steps_of_a_generation_share_their_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(routing="prefix:1")
    stacks = spy(monkeypatch, "concat_rows")
    model.generate(token_ids(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert stacks == [9, 3, 9, 3]


def test_cached_stacks_are_not_used_for_a_gradient() -> None:
    model = mixture(routing="prefix:1")
    with model.experts.routing_state.cache_stacks():
        with torch.no_grad():
            model(token_ids(2, 5))
        model(token_ids(2, 5), labels=token_ids(2, 5)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (3, 2), (14, 2)])
def test_decoding_step_by_step_equals_one_forward(experts: int, top_k: int, batch: int, routing: str) -> None:
    model = mixture(routing=routing, mature=True, num_experts=experts, top_k=top_k)
    ids = token_ids(batch, 7)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        with model.experts.routing_state.cache_stacks():
            for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache, steps = cache_of(output), [*steps, output.logits]
    assert relative_error(torch.cat(steps, dim=1), whole) < 1e-9


class WeightWriter(LogitsProcessor):
    """Logits processor that writes to the experts between two steps of a generation."""

    def __init__(self, model: DyLoRA_MoE, at_step: int) -> None:
        self.model, self.at_step, self.step = model, at_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step == self.at_step:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if ".lora_" in name:
                        parameter.mul_(-3)
        return scores


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_generation_drops_its_stacks_when_a_weight_is_written_to(batch: int, top_k: int) -> None:
    ids, new = token_ids(batch, 5), 6
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "output_logits": True}
    model = mixture(routing="per_layer", mature=True, top_k=top_k)
    processors = [WeightWriter(model, 3)]
    got = model.generate(ids, return_dict_in_generate=True, logits_processor=processors, **options).logits
    model = mixture(routing="per_layer", mature=True, top_k=top_k)
    writer, cache, piece, wanted = WeightWriter(model, 3), None, ids, []
    with torch.no_grad():
        for _ in range(new):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache, logits = cache_of(output), writer(ids, output.logits[:, -1])
            wanted.append(logits)
            piece = logits.argmax(dim=-1, keepdim=True)
    assert relative_error(torch.stack(got).double(), torch.stack(wanted)) < 1e-6  # generate rounds logits to float32
    assert model.experts.routing_state.scope.stack_cache is None, "stacks must not outlive the generation"


def test_no_layer_below_the_prefix_layer_is_in_the_backward_pass() -> None:
    model = mixture(routing="prefix:2").train()
    seen: list[bool] = []
    for layer in model.experts.base_model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(token_ids(2, 5), labels=token_ids(2, 5)).loss.backward()
    assert seen == [False, False, True]
