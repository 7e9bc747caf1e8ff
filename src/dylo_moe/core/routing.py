"""Where the router reads its input: the routing modes, as hooks on an unmodified base model.

==============  ======================================================  ======
mode            the router reads                                        passes
==============  ======================================================  ======
``final``       the base's last hidden states, adapters off, no grad    2
``prefix:K``    the hidden states that enter decoder layer K; the       1
                layers below K carry no experts
``context:K``   the mean of those over the example's tokens so far;     1
                see ``context``
``per_layer``   each decoder layer's own input, one gate a layer        1
==============  ======================================================  ======

The hooks sit on the backbone and its decoder layers, which training, evaluation and ``generate`` all run, so
that there is one path. Each weight depends on its own token's hidden state, and so on earlier tokens alone.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from dylo_moe.core.context import context_of, running_means
from dylo_moe.core.mixture import TokenWeights, one_expert
from dylo_moe.core.router import DynamicHybridRouter
from dylo_moe.core.routing_state import RoutingState
from dylo_moe.errors import ModelError, RoutingError

_MODE_WITH_LAYER = re.compile(r"(?P<mode>prefix|context):(?P<layer>\d+)")

Experts = Callable[[], Sequence[int]]
"""Tells which experts, by index, are routed among now."""


def resolve_routing(routing: str, num_layers: int) -> str:
    """Checks a routing mode; ``prefix`` and ``context`` get a K of a quarter of the layers.

    Raises:
        RoutingError: The mode is unknown, or K is no decoder layer.
    """
    if routing in ("prefix", "context"):
        return f"{routing}:{num_layers // 4}"
    if routing in ("final", "per_layer"):
        return routing
    match = _MODE_WITH_LAYER.fullmatch(routing)
    if match is None:
        raise RoutingError(f"routing must be final, per_layer, prefix, prefix:K, context or context:K, got {routing!r}")
    if int(match["layer"]) >= num_layers:
        raise RoutingError(
            f"routing {match['mode']}:K needs K from 0 to {num_layers - 1} for this model, got {routing!r}"
        )
    return routing


def prefix_layer(routing: str) -> int:
    """The first decoder layer that carries experts under a resolved routing mode."""
    match = _MODE_WITH_LAYER.fullmatch(routing)
    return int(match["layer"]) if match else 0


def reads_context(routing: str) -> bool:
    """Whether a resolved mode reads the mean over the tokens so far."""
    return routing.startswith("context")


def decoder_layers(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """The model's stack of decoder layers.

    Raises:
        ModelError: The model keeps its layers in no list of ``num_hidden_layers`` modules.
    """
    count = causal_lm.config.get_text_config().num_hidden_layers
    for module in backbone(causal_lm).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(causal_lm).__name__} has no list of {count} decoder layers; experts need a decoder-only causal LM"
    )


def backbone(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """The model without its language-modelling head."""
    inner = causal_lm.base_model
    if inner is causal_lm or not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(causal_lm).__name__} has no backbone apart from its head; is it a causal LM?")
    return inner


def attach_router(
    causal_lm: PreTrainedModel, routing: str, router: DynamicHybridRouter, state: RoutingState, experts: Experts
) -> None:
    """Lets ``router`` set the routing weights of each forward that is given none.

    Args:
        causal_lm: The base model, already carrying routed LoRA layers.
        routing: A resolved mode.
        router: One gate, or for ``per_layer`` one for each decoder layer.
        state: What the routed layers read.
        experts: Called in each forward: the indices of the experts to route among.
    """
    layers = decoder_layers(causal_lm)
    if routing == "final":
        hook = partial(_route_by_base_pass, state, router, experts)
        backbone(causal_lm).register_forward_pre_hook(hook, with_kwargs=True)
        return
    if reads_context(routing):
        backbone(causal_lm).register_forward_pre_hook(partial(_note_context, state), with_kwargs=True)
        read = partial(_route_by_context, state, router, experts)
        layers[prefix_layer(routing)].register_forward_pre_hook(read, with_kwargs=True)
        return
    chosen = enumerate(layers) if routing == "per_layer" else [(0, layers[prefix_layer(routing)])]
    for gate, layer in chosen:
        layer.register_forward_pre_hook(partial(_route_by_input, state, router, experts, gate), with_kwargs=True)


def _route(state: RoutingState, router: DynamicHybridRouter, experts: Experts, hidden: Tensor, gate: int = 0) -> None:
    routed = experts()
    if state.record is None and (expert := router.choose_one(hidden, gate, routed)) is not None:
        state.weights = one_expert(expert, len(routed))
        return
    output = router(hidden, gate, routed)
    state.weights = TokenWeights(output.weights, output.chosen)
    if state.record is not None:
        state.record.append(output)


def _route_by_input(
    state: RoutingState,
    router: DynamicHybridRouter,
    experts: Experts,
    gate: int,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if not state.base_only and not state.given:
        _route(state, router, experts, args[0] if args else kwargs["hidden_states"], gate)


def _note_context(
    state: RoutingState, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if state.base_only or state.given:
        return None
    state.context = context_of(model, kwargs)
    return args, {**kwargs, "past_key_values": state.context.cache}


def _route_by_context(
    state: RoutingState,
    router: DynamicHybridRouter,
    experts: Experts,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if not state.base_only and not state.given:
        hidden = args[0] if args else kwargs["hidden_states"]
        _route(state, router, experts, running_means(hidden, state.context))


def _route_by_base_pass(
    state: RoutingState,
    router: DynamicHybridRouter,
    experts: Experts,
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if state.base_only or state.given:
        return None
    kwargs = {**kwargs, "past_key_values": _two_pass_cache(model, kwargs)}
    cache = kwargs["past_key_values"]
    base_kwargs = {**kwargs, "past_key_values": cache and cache.base_pass, "use_cache": cache is not None}
    base_kwargs.update(output_hidden_states=False, output_attentions=False)
    with torch.no_grad(), state.scope(base_only=True), evaluating(model):
        features = model(*args, **base_kwargs)[0]
    _route(state, router, experts, features)
    return args, kwargs


class TwoPassCache(DynamicCache):
    """A key-value cache for the mixed pass that carries the base pass's own, and reorders both alike."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.base_pass = DynamicCache(config=config)

    @override
    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.base_pass.reorder_cache(beam_idx)

    @override
    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.base_pass.crop(*args, **kwargs)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.base_pass.batch_repeat_interleave(repeats)

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.base_pass.batch_select_indices(indices)

    @override
    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.base_pass.reset()


def _two_pass_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> TwoPassCache | None:
    """The caller's cache, or a new one in the place of an empty one; the model returns it with its output."""
    given = kwargs.get("past_key_values")
    if isinstance(given, TwoPassCache):
        return given
    if given is not None and (not isinstance(given, DynamicCache) or given.get_seq_length() > 0):
        raise RoutingError(
            f"routing 'final' runs two passes and needs a cache for both: got a {type(given).__name__} that knows only "
            "one; pass no past_key_values, or the one that an earlier forward of this model returned"
        )
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = model.config.use_cache and not model.training
    return TwoPassCache(model.config) if use_cache or given is not None else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Base features must not depend on dropout: evaluation mode for the pass, then each module as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
