"""The routing modes on every family: causal, and the same with and without a cache, in a batch and alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base.structure import backbone, decoder_layers
from dylo_moe.core.routing.caches import CACHE_NAME
from dylo_moe.errors import ModelError, RoutingError
from tests.support.families import (
    FAMILIES,
    LAYERS,
    PAD,
    ROUTINGS,
    VOCABULARY,
    cache_of,
    mixture,
    padded,
    relative_error,
    stir,
    tiny,
    token_ids,
)

TOLERANCE = 1e-9
NEW_TOKENS = 48
SPARSENESS = pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_ROUTING = pytest.mark.parametrize("routing", ROUTINGS)

VARIED_POSITIONS = ("llama", "gemma3", "gpt2")
PROMPTS = [token_ids(1, length, seed=length)[0] for length in (3, 9, 14, 6)]


# --- causality -------------------------------------------------------------------------------------------------------


@EVERY_FAMILY
@EVERY_ROUTING
@pytest.mark.parametrize("state", ["training", "dense", "sparse"])
def test_a_later_token_leaves_earlier_logits_alone(family: str, routing: str, state: str) -> None:
    model = mixture(family, routing, mature=state == "sparse", dropout=0.2).train(state == "training")
    ids = token_ids(2, 12)
    outputs = []
    for edited in (None, 6):
        tokens = ids.clone()
        if edited is not None:
            tokens[:, edited] = (tokens[:, edited] + 1) % VOCABULARY
        torch.manual_seed(0)  # the same dropout
        outputs.append(model(tokens))
    before, after = outputs
    assert relative_error(after.logits[:, :6], before.logits[:, :6]) < TOLERANCE
    assert relative_error(after.router_logits[:, :, :6], before.router_logits[:, :, :6]) < TOLERANCE
    assert ((after.logits - before.logits).abs().amax(dim=-1)[:, 6:] > 1e-4).all(), "the edit must matter later"
    assert ((after.router_logits - before.router_logits).abs().amax(dim=-1)[:, :, 6] > 1e-4).all()


# --- what each mode reads --------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_final_reads_the_base_models_last_hidden_states(family: str) -> None:
    model, ids = mixture(family, "final"), token_ids(2, 7)
    features = backbone(tiny(family))(ids).last_hidden_state
    assert relative_error(model(ids).router_logits[0], model.router(features).logits) < TOLERANCE


@EVERY_FAMILY
@pytest.mark.parametrize("layer", range(LAYERS))
def test_prefix_reads_what_enters_its_layer_and_carries_no_experts_below(family: str, layer: int) -> None:
    model, ids = mixture(family, f"prefix:{layer}"), token_ids(2, 7)
    entering = tiny(family)(ids, output_hidden_states=True).hidden_states[layer]
    output = model(ids)
    assert relative_error(output.router_logits[0], model.router(entering).logits) < TOLERANCE
    carrying = [
        index
        for index, module in enumerate(decoder_layers(model.experts.base_model))
        if any("lora_" in name for name, _ in module.named_parameters())
    ]
    assert carrying == list(range(layer, LAYERS))


@EVERY_FAMILY
def test_per_layer_reads_each_layers_own_input(family: str) -> None:
    model, ids = mixture(family, "per_layer"), token_ids(2, 7)
    output = model(ids, output_hidden_states=True)
    entering: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in decoder_layers(model.experts.base_model)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    assert output.router_logits.shape == (LAYERS, 2, 7, 3)
    for gate, hidden in enumerate(entering):
        assert relative_error(output.router_logits[gate], model.router(hidden, gate).logits) < TOLERANCE


@EVERY_ROUTING
@SPARSENESS
def test_the_forward_mixes_by_the_routers_weights(routing: str, mature: bool) -> None:
    """The router's weights, given as ``routing_weights``, lead to the same logits; per_layer has one tensor a layer."""
    model, ids = mixture("llama", routing, mature=mature), token_ids(2, 7)
    output = model(ids)
    assert (output.routing_weights == 0).any().item() == mature
    torch.testing.assert_close(
        output.routing_weights.sum(dim=-1), torch.ones(output.routing_weights.shape[:-1]).double()
    )
    if routing != "per_layer":
        given = model(ids, routing_weights=output.routing_weights[0])
        assert relative_error(given.logits, output.logits) < TOLERANCE
        assert given.router_logits is None, "the router must not run if weights are given"


@EVERY_ROUTING
def test_given_weights_replace_those_of_the_router(routing: str) -> None:
    model, ids = mixture("llama", routing), token_ids(2, 7)
    one_hot = torch.zeros(2, 7, 3, dtype=torch.float64)
    one_hot[..., 1] = 1
    got = model(ids, routing_weights=one_hot).logits
    model.experts.set_active("expert_1")
    assert relative_error(got, model(ids).logits) < TOLERANCE
    with model.base_only():
        base = model(ids).logits
    assert torch.equal(base, tiny("llama")(ids).logits)
    model.experts.activate_all()
    assert relative_error(model(ids, routing_weights=one_hot * 0).logits, base) < TOLERANCE
    assert relative_error(got, base) > 0.01


@EVERY_ROUTING
def test_base_features_do_not_depend_on_dropout(routing: str) -> None:
    """While training, ``final`` still reads the base in evaluation mode, and every module trains again afterwards."""
    base = tiny("gpt2")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model = DyLoRA_MoE(base, 3, rank=4, routing=routing, dropout=0.3).train()
    stir(model)
    ids = token_ids(2, 7)
    first, second = model(ids), model(ids)
    assert relative_error(first.logits, second.logits) > 1e-3, "dropout must be on"
    assert torch.equal(first.router_logits, second.router_logits) == (routing in ("final", "base_context:1"))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("routing", ["final", "prefix:1"])
def test_frozen_features_pass_no_gradient_below(routing: str) -> None:
    model = mixture("llama", routing).train()
    model(token_ids(2, 7)).router_logits.sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == ["router.gates.0"]


# --- generation ------------------------------------------------------------------------------------------------------


def generate(model: DyLoRA_MoE | PreTrainedModel, prompts: list[Tensor], **options: object) -> Tensor:
    """The new tokens for left-padded prompts: ``(prompts, new tokens)``."""
    ids, mask = padded(prompts, "left")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize(
    ("family", "mature"),
    # rotary, sliding-window and absolute positions both ways; the other families once
    [(family, mature) for family in FAMILIES for mature in (False, True) if mature or family in VARIED_POSITIONS],
)
@EVERY_ROUTING
def test_greedy_is_the_same_with_a_cache_without_and_alone(family: str, routing: str, mature: bool) -> None:
    model = mixture(family, routing, mature=mature)
    new = NEW_TOKENS if family in VARIED_POSITIONS else NEW_TOKENS // 3
    cached = generate(model, PROMPTS, max_new_tokens=new)
    assert cached.shape == (len(PROMPTS), new)
    assert torch.equal(cached, generate(model, PROMPTS, max_new_tokens=new, use_cache=False))
    assert torch.equal(cached, torch.cat([generate(model, [prompt], max_new_tokens=new) for prompt in PROMPTS]))
    base = generate(tiny(family), PROMPTS, max_new_tokens=new)
    assert not torch.equal(cached, base), "the experts must matter, or nothing was checked"


@EVERY_ROUTING
@SPARSENESS
@pytest.mark.parametrize("family", VARIED_POSITIONS)
def test_greedy_follows_the_logits_of_one_full_forward(family: str, routing: str, mature: bool) -> None:
    """Each generated token is the likeliest one under the forward that training and evaluation run."""
    model, prompt = mixture(family, routing, mature=mature), PROMPTS[1]
    answer = generate(model, [prompt])[0]
    logits = model(torch.cat([prompt, answer])[None]).logits[0]
    assert torch.equal(logits[len(prompt) - 1 : -1].argmax(dim=-1), answer)


@EVERY_ROUTING
@SPARSENESS
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "beam sampling", "sampling", "several samples"],
)
def test_beams_and_sampling_are_the_same_without_a_cache(
    family: str, routing: str, mature: bool, options: dict[str, object]
) -> None:
    model = mixture(family, routing, mature=mature)
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outcomes.append(generate(model, PROMPTS, max_new_tokens=12, use_cache=use_cache, **options))
    assert len(outcomes[0]) == len(PROMPTS) * options.get("num_return_sequences", 1)
    assert torch.equal(*outcomes)
    torch.manual_seed(0)
    assert not torch.equal(outcomes[0], generate(tiny(family), PROMPTS, max_new_tokens=12, **options))


@EVERY_ROUTING
def test_beams_of_a_batch_are_those_of_each_prompt_alone(routing: str) -> None:
    model = mixture("llama", routing)
    together = generate(model, PROMPTS, num_beams=3, max_new_tokens=12)
    alone = [generate(model, [prompt], num_beams=3, max_new_tokens=12) for prompt in PROMPTS]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, generate(model, PROMPTS, max_new_tokens=12)), "beams must differ from greedy"


@EVERY_ROUTING
def test_prompt_lookup_gives_the_greedy_answer(routing: str) -> None:
    """Assisted decoding takes back rejected tokens, so every cache must be cropped."""
    model, prompt = mixture("llama", routing), PROMPTS[2].repeat(2)
    # an id beyond the vocabulary: before 5.23 transformers fails without an end token
    options = {"eos_token_id": VOCABULARY}
    looked_up = generate(model, [prompt], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked_up, generate(model, [prompt], **options))


@EVERY_FAMILY
@EVERY_ROUTING
@SPARSENESS
def test_stepping_with_the_returned_cache_gives_the_logits_of_one_forward(
    family: str, routing: str, mature: bool
) -> None:
    model, ids = mixture(family, routing, mature=mature), token_ids(2, 20)
    whole = model(ids).logits
    cache, steps = None, []
    for piece in ids.split([9, 1, 1, 4, 1, 4], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = cache_of(output)
        steps.append(output.logits)
    assert relative_error(torch.cat(steps, dim=1), whole) < TOLERANCE


@EVERY_ROUTING
@torch.no_grad()
def test_a_cache_can_be_copied_and_continued_twice(routing: str) -> None:
    model, ids = mixture("llama", routing), token_ids(1, 12)
    cache = cache_of(model(ids[:, :8], use_cache=True))
    twin = copy.deepcopy(cache)
    first = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(model(ids[:, 8:], past_key_values=twin, use_cache=True).logits, first)
    assert relative_error(first, model(ids).logits[:, 8:]) < TOLERANCE


def test_final_refuses_a_cache_that_knows_one_pass_only() -> None:
    model, ids = mixture("llama", "final"), token_ids(1, 6)
    cache = DynamicCache(config=model.config)
    tiny("llama")(ids, use_cache=True, **{CACHE_NAME: cache})
    with pytest.raises(
        RoutingError, match="'final' needs a cache that carries the router's part along: got a DynamicCache of 6 tokens"
    ):
        model(ids, past_key_values=cache, use_cache=True)


# --- modes and models that do not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ("first", "`routing` must be final, per_layer, prefix:K, context:K or base_context:K, got 'first'"),
        ("", "`routing` must be .*, got ''"),
        ("prefix:", "`routing` must be .*, got 'prefix:'"),
        ("prefix:-1", "`routing` must be .*, got 'prefix:-1'"),
        ("prefix:1.5", "`routing` must be .*, got 'prefix:1.5'"),
        ("prefix:3", "prefix:K needs K from 0 to 2 for this model, got 'prefix:3'"),
    ],
)
def test_modes_that_do_not_fit_are_refused_before_the_base_is_touched(routing: str, message: str) -> None:
    base = tiny("llama")
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(RoutingError, match=message) as refused:
        DyLoRA_MoE(base, 2, routing=routing)
    assert "\n" not in str(refused.value)
    assert [name for name, _ in base.named_parameters()] == names


def test_a_model_without_a_stack_of_decoder_layers_is_refused() -> None:
    config = T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=4)
    with pytest.raises(ModelError, match=r"is it a causal LM|decoder-only causal LM"):
        DyLoRA_MoE(T5ForConditionalGeneration(config), 2)


@EVERY_FAMILY
def test_a_backbone_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"has no backbone apart from its head; is it a causal LM\?"):
        decoder_layers(backbone(tiny(family)))
