"""Routes by the whole prompt, against each prompt's own expert as PEFT's mixed batches choose it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dylo_moe.core import DyLoRA_MoE
from dylo_moe.errors import RoutingError
from tests.support.families import tiny

MODES = ("context:2", "base_context:2", "prefix:2", "final")


def mixture(routing: str, **options: Any) -> DyLoRA_MoE:
    """Return a mixture with a router that prefers different experts for different prompts."""
    model = DyLoRA_MoE(tiny(), 3, rank=2, routing=routing, top_k=1, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.router.gates[0], std=2.0)
    model.set_maturity()
    return model.eval()


def prompts(model: DyLoRA_MoE, left: bool = True) -> dict[str, torch.Tensor]:
    """Return three prompts of 3, 5 and 7 tokens, padded."""
    ids = torch.randint(1, model.config.vocab_size, (3, 7))
    mask = torch.tensor([[0] * (7 - n) + [1] * n if left else [1] * n + [0] * (7 - n) for n in (3, 5, 7)])
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model: Any, given: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """Return greedy answers of exactly six tokens."""
    ids = model.generate(**given, do_sample=False, min_new_tokens=6, max_new_tokens=6, pad_token_id=0, **options)
    answers: list[list[int]] = ids[:, given["input_ids"].shape[1] :].tolist()
    return answers


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("routing", MODES)
def test_the_weights_are_the_routers_at_the_last_token(routing: str, left: bool) -> None:
    model = mixture(routing)
    given = prompts(model, left)
    weights = model(**given).routing_weights[0]
    last = [6, 6, 6] if left else [2, 4, 6]
    wanted = torch.stack([weights[row, place] for row, place in enumerate(last)])
    torch.testing.assert_close(model.prompt_weights(**given), wanted[:, None])
    alone = [model.prompt_weights(ids[mask > 0][None]) for ids, mask in zip(*given.values(), strict=True)]
    torch.testing.assert_close(torch.cat(alone), wanted[:, None])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("routing", MODES)
def test_a_generation_is_that_of_each_prompts_expert(routing: str, options: dict[str, Any]) -> None:
    model = mixture(routing)
    given = prompts(model)
    names = [model.experts.names[one] for one in model.prompt_weights(**given)[:, 0].argmax(dim=-1)]
    wanted = generated(model, given, adapter_names=names, **options)
    assert generated(model, given, route="prompt", **options) == wanted
    model.route = "prompt"
    assert generated(model, given, **options) == wanted


def test_positional_prompts_and_prompts_by_their_other_name() -> None:
    model = mixture("base_context:2")
    model.route = "prompt"
    ids = torch.randint(1, model.config.vocab_size, (1, 5))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, **options).tolist()
    assert model.generate(ids, **options).tolist() == wanted
    assert model.generate(inputs=ids, **options).tolist() == wanted


def test_routes_by_token_and_by_prompt_differ() -> None:
    torch.manual_seed(0)
    model = mixture("context:2")
    found = [
        (generated(model, given, route="token"), generated(model, given, route="prompt"))
        for given in [prompts(model) for _ in range(5)]
    ]
    assert any(one != other for one, other in found)


def test_nothing_above_the_router_runs() -> None:
    model = mixture("base_context:2")
    ran = []
    for index, layer in enumerate(model.experts.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model.prompt_weights(torch.randint(1, 50, (1, 4)))
    assert set(ran) <= {0, 1, 2}


def test_a_shared_expert_stays_on() -> None:
    model = mixture("context:2", shared_rank=2)
    given = prompts(model)
    names = [model.experts.names[one] for one in model.prompt_weights(**given)[:, 0].argmax(dim=-1)]
    assert generated(model, given, route="prompt") == generated(model, given, adapter_names=names)


def test_the_base_alone_and_given_weights_need_no_route() -> None:
    model = mixture("context:2")
    model.route = "prompt"
    given = prompts(model)
    with model.base_only():
        assert generated(model, given) == generated(model, given, adapter_names=["__base__"] * 3)
    one = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert generated(model, given, routing_weights=one) == generated(model, given, adapter_names=["expert_1"] * 3)


def test_the_route_is_saved_and_loaded(tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model = DyLoRA_MoE(str(tmp_path / "base"), 2, rank=2, routing="context:2", top_k=1)
    torch.nn.init.normal_(model.router.gates[0], std=2.0)
    model.set_maturity()
    model.route = "prompt"
    model.save_pretrained(tmp_path / "mixture")
    assert DyLoRA_MoE.from_pretrained(tmp_path / "mixture").route == "prompt"
    given = prompts(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert generated(loaded, given) == generated(model.eval(), given)


@pytest.mark.parametrize(
    ("routing", "route", "message"),
    [
        ("per_layer", "prompt", "needs a routing mode with one gate"),
        ("context:2", "request", "must be token or prompt, got 'request'"),
    ],
)
def test_a_route_that_cannot_be_is_refused(routing: str, route: str, message: str) -> None:
    model = mixture(routing)
    with pytest.raises(RoutingError, match=message):
        generated(model, prompts(model), route=route)
    # the remedy
    assert generated(model, prompts(model), route="token")
