"""Caches of every kind carry the router's part along; cropping and reordering change both."""

import copy

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from dylo_moe.core.routing.caches import ContextPart, RunningSums, with_cache_renamed
from dylo_moe.core.routing.context import Context, running_means
from dylo_moe.errors import RoutingError
from tests.support.families import ROUTINGS, cache_of, mixture, relative_error, token_ids

EVERY_ROUTING = pytest.mark.parametrize("routing", ROUTINGS)
NEW = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


@EVERY_ROUTING
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_generation_is_the_same_with_every_kind_of_cache(routing: str, family: str, kind: str) -> None:
    model, ids = mixture(family, routing, mature=True), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **NEW)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation=kind, **NEW), plain)


@EVERY_ROUTING
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_assisted_decoding_gives_the_greedy_answer(routing: str, family: str) -> None:
    model, ids = mixture(family, routing), token_ids(1, 6, seed=8).repeat(1, 2)
    # older versions of transformers fail without an end token
    new = {**NEW, "eos_token_id": 60}
    greedy = model.generate(ids, **new)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **new), greedy)
    other = mixture(family, routing, seed=5)
    other.generation_config.num_assistant_tokens = 4
    assert torch.equal(model.generate(ids, assistant_model=other, **new), greedy)


@EVERY_ROUTING
@torch.no_grad()
def test_a_cache_of_the_caller_is_filled_and_continued(routing: str) -> None:
    model, ids = mixture("llama", routing), token_ids(2, 10)
    want = model(ids).logits
    caches: list[Cache] = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]
    for cache in caches:
        first = model(ids[:, :6], past_key_values=cache, use_cache=True)
        assert cache_of(first) is cache and int(cache.get_seq_length()) == 6
        twin = copy.deepcopy(cache)
        for one in (cache, twin):
            assert relative_error(model(ids[:, 6:], past_key_values=one, use_cache=True).logits, want[:, 6:]) < 1e-9


@pytest.mark.parametrize("routing", ["final", "context:1"])
@torch.no_grad()
def test_a_cache_that_was_changed_behind_the_routers_back_is_refused(routing: str) -> None:
    model, ids = mixture("llama", routing), token_ids(1, 6)
    cache = cache_of(model(ids, use_cache=True))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
    with pytest.raises(RoutingError, match=r"a DynamicCache of 4 tokens of which the router knows 6; pass no cache"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(RoutingError, match=r"needs a cache of transformers.Cache, got a list"):
        model(ids, past_key_values=[1], use_cache=True)


def test_sums_can_be_taken_back_across_forwards_as_far_as_they_are_kept() -> None:
    part = ContextPart()
    for length in (300, 1, 1, 2):
        part.append(RunningSums(torch.ones(1, length, 4), torch.ones(1, length, 1)))
    part.follow("crop", 3, (), {})
    assert part.length() == 301
    with pytest.raises(RoutingError, match="can take back 256 tokens here, and 290 were asked for"):
        part.follow("crop", 290, (), {})
    part.follow("batch_repeat_interleave", 0, (2,), {})
    part.follow("crop", 301, (), {})
    assert part.length() == 0


@pytest.mark.parametrize("names", [("cache",), ("past_key_values",)])
def test_a_cache_is_passed_by_the_models_name_for_it(names: tuple[str, ...]) -> None:
    for given in ("cache", "past_key_values"):
        assert with_cache_renamed({given: 1, "x": 2}, names) == {names[0]: 1, "x": 2}
    assert with_cache_renamed({"x": 2}, names) == {"x": 2}


def test_a_long_packed_row_keeps_the_digits_of_its_last_example() -> None:
    torch.manual_seed(0)
    lengths = (32_768, 100)
    features = torch.randn(1, sum(lengths), 8)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = running_means(features, Context(positions=positions))[:, lengths[0] :]
    alone = running_means(features[:, lengths[0] :].double(), Context())
    assert (packed - alone).abs().max() < 1e-6


@torch.no_grad()
def test_a_mask_for_each_token_is_uniform_attention() -> None:
    model, ids = mixture("llama", "context:1"), token_ids(2, 6)
    seen = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, :, :, :2] = False  # two tokens of padding
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = ids.clone()
    for four in (seen, torch.zeros(seen.shape).double().masked_fill(~seen, torch.finfo(torch.float64).min)):
        got = model(ids, attention_mask=four, labels=labels)
        want = model(ids, attention_mask=mask, labels=labels)
        real = mask.bool()
        assert relative_error(got.router_logits[0][real], want.router_logits[0][real]) < 1e-6
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
