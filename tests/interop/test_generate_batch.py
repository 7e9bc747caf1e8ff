"""Continuous batching: one paged cache for all requests, filled by a thread of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import RoutingError
from tests.support.saved_mixture import mixture_on

PROMPTS = [[5, 6, 7, 8, 9], [40, 41, 42], [9, 30, 7, 100, 5, 41, 77]]
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
NEW_TOKENS = 6


def options() -> dict[str, object]:
    return {
        "generation_config": GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": SMALL,
        "progress_bar": False,
    }


def generate_one_by_one(model: DyLoRA_MoE) -> list[list[int]]:
    config = options()["generation_config"]
    made = [model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in PROMPTS]
    return [tokens[len(prompt) :] for tokens, prompt in zip(made, PROMPTS, strict=True)]


@pytest.mark.parametrize("routing", ["per_layer", "prefix:1", "prefix:0"])
def test_generate_batch_gives_the_tokens_of_generate(routing: str, base_folder: Path) -> None:
    model = mixture_on(base_folder, routing)
    wanted = generate_one_by_one(model)
    with model.base_only():
        assert generate_one_by_one(model) != wanted, "the experts make no difference to the tokens"
    outputs = model.generate_batch(PROMPTS, **options())
    assert [output.generated_tokens for output in outputs.values()] == wanted


@pytest.mark.parametrize("routing", ["final", "context:1"])
def test_modes_that_need_more_of_earlier_tokens_are_refused(routing: str, base_folder: Path) -> None:
    model = mixture_on(base_folder, routing)
    calls = []
    model.experts.base_model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(RoutingError, match="continuous batching"):
        model.generate_batch(PROMPTS, **options())
    with pytest.raises(RoutingError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(RoutingError, match="continuous batching"), model.continuous_batching_context_manager():
        pass
    assert calls == []


@pytest.mark.parametrize("routing", ["final", "context:1"])
def test_the_base_of_such_a_mixture_makes_no_wrong_tokens(routing: str, base_folder: Path) -> None:
    model = mixture_on(base_folder, routing)
    outputs = model.experts.base_model.generate_batch(PROMPTS, **options())
    for output in outputs.values():
        assert output.generated_tokens == []
        assert "needs a cache of transformers.Cache" in str(output.error)
