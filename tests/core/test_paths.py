"""The whole mixture by its quick paths, sparse and decoding, against the dense product that training uses."""

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from dylo_moe import DyLoRA_MoE
from families import ROUTINGS, mixture, relative_error, token_ids

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


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (3, 2), (14, 2)])
def test_decoding_step_by_step_equals_one_forward(experts: int, top_k: int, batch: int, routing: str) -> None:
    model = mixture(routing=routing, mature=True, num_experts=experts, top_k=top_k)
    ids = token_ids(batch, 7)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        with model.experts.routing_state.keeping_stacks():
            for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache, steps = output.past_key_values, [*steps, output.logits]
    assert relative_error(torch.cat(steps, dim=1), whole) < 1e-9


class Meddler(LogitsProcessor):
    """Writes to the experts between two steps of a generation."""

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
    processors = [Meddler(model, 3)]
    got = model.generate(ids, return_dict_in_generate=True, logits_processor=processors, **options).logits
    model = mixture(routing="per_layer", mature=True, top_k=top_k)
    meddler, cache, piece, wanted = Meddler(model, 3), None, ids, []
    with torch.no_grad():
        for _ in range(new):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, meddler(ids, output.logits[:, -1])
            wanted.append(logits)
            piece = logits.argmax(dim=-1, keepdim=True)
    assert relative_error(torch.stack(got).double(), torch.stack(wanted)) < 1e-6  # generate rounds logits to float32
    assert model.experts.routing_state.kept is None, "stacks may not outlive the generation"


def test_nothing_below_the_prefix_layer_takes_part_in_the_backward_pass() -> None:
    model = mixture(routing="prefix:2").train()
    seen: list[bool] = []
    for layer in model.experts.base_model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model(token_ids(2, 5), labels=token_ids(2, 5)).loss.backward()
    assert seen == [False, False, True]
