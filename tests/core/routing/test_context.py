"""Routing ``context:K`` against the mean over an example's tokens so far, taken one token at a time."""

import pytest
import torch
from transformers import DynamicCache

from dylo_moe.core.routing.caches import CACHE_NAME
from dylo_moe.core.routing.context import Context, running_means
from dylo_moe.core.routing.router import rms_normalize
from dylo_moe.errors import RoutingError
from tests.support.families import FAMILIES, HIDDEN, PAD, gradients, mixture, padded, relative_error, tiny, token_ids

TOLERANCE = 1e-9


def hidden(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_the_mean_of_the_hidden_states_that_enter_its_layer(family: str) -> None:
    model, ids = mixture(family, "context:1"), token_ids(2, 7)
    entering = rms_normalize(tiny(family)(ids, output_hidden_states=True).hidden_states[1])
    means = torch.stack([entering[:, : end + 1].mean(dim=1) for end in range(7)], dim=1)
    assert relative_error(model(ids).router_logits[0], model.router(means).logits) < TOLERANCE


def test_padding_and_other_examples_of_a_row_are_left_out() -> None:
    features = hidden(1, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    alone = running_means(features[:, 2:7], Context())
    assert torch.allclose(running_means(features, Context(mask))[:, 2:7], alone)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    packed = running_means(features, Context(positions=positions))
    pieces = [running_means(piece, Context()) for piece in features.split([3, 2, 4], dim=1)]
    assert torch.allclose(packed, torch.cat(pieces, dim=1))


def test_a_packed_row_is_routed_as_its_examples_are() -> None:
    model = mixture("llama", "context:1", mature=True, top_k=1)
    rows = [token_ids(1, length, seed=length)[0] for length in (6, 9, 4)]
    ids = torch.cat(rows)[None]
    segments = torch.cat([torch.full((len(row),), index + 1) for index, row in enumerate(rows)])[None]
    packed = model(ids, segment_ids=segments)
    alone = [model(row[None]) for row in rows]
    weights = torch.cat([one.routing_weights for one in alone], dim=2)
    assert torch.equal(packed.routing_weights, weights)
    assert relative_error(packed.logits, torch.cat([one.logits for one in alone], dim=1)) < TOLERANCE


def test_a_padded_batch_is_routed_as_each_row_alone() -> None:
    model = mixture("llama", "context:1")
    rows = [token_ids(1, length, seed=length)[0] for length in (5, 11)]
    for side in ("left", "right"):
        ids, mask = padded(rows, side, PAD)
        logits = model(ids, attention_mask=mask).router_logits[0]
        for row, found, real in zip(rows, logits, mask.bool(), strict=True):
            # rotary positions that padding shifts are rounded differently
            assert relative_error(found[real], model(row[None]).router_logits[0, 0]) < 1e-6


def test_a_cache_or_mask_without_the_context_is_refused() -> None:
    model, ids = mixture("llama", "context:1"), token_ids(1, 6)
    cache = DynamicCache(config=model.config)
    tiny("llama")(ids, use_cache=True, **{CACHE_NAME: cache})
    with pytest.raises(RoutingError, match="a DynamicCache of 6 tokens of which the router knows 0"):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(RoutingError, match=r"attention_mask of shape \(batch, seq\)"):
        model(ids, attention_mask={"full_attention": torch.ones(1, 6)})


def test_a_layer_that_runs_again_in_the_backward_pass_reads_the_context_of_its_own_forward() -> None:
    batches = [
        padded([token_ids(1, length, seed=length)[0] for length in lengths], "left", PAD)
        for lengths in ((5, 9), (8, 3))
    ]
    outcomes = []
    for checkpointing in (False, True):
        model = mixture("llama", "context:1").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        sum(model(ids, mask, ids).loss for ids, mask in batches).backward()
        outcomes.append(gradients(model))
    for name, gradient in outcomes[0].items():
        assert relative_error(outcomes[1][name], gradient) < TOLERANCE, name
