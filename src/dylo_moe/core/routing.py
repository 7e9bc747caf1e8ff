"""Where the router reads its input: the routing modes, on an unmodified base model.

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

Training, evaluation and ``generate`` all run the backbone and its decoder layers, so there is one path. Each weight
depends on its own token's hidden state, and so on earlier tokens alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dylo_moe.core.caches import BasePass, ContextPart, carry, empty_copy, part_of
from dylo_moe.core.context import Context, means, running_sums
from dylo_moe.core.decoder import Decoder, argument_names, evaluating, hidden_states_of, named_arguments
from dylo_moe.core.expert import ExpertManager, carried_by_layers
from dylo_moe.core.extension import extend, restore
from dylo_moe.core.mixture import TokenWeights, one_expert
from dylo_moe.core.offload import device_of
from dylo_moe.core.routed_forward import RoutedBackbone
from dylo_moe.core.router import DynamicHybridRouter
from dylo_moe.core.routing_state import Call, RoutingState
from dylo_moe.errors import ModelError, RoutingError

_MODE_WITH_LAYER = re.compile(r"(?P<mode>prefix|context):(?P<layer>\d+)")

Experts = Callable[[], Sequence[int]]
"""Tells which experts, by index, are routed among now."""

Run = Callable[..., Any]
"""The backbone's own forward."""


def resolve_routing(routing: str, num_layers: int) -> str:
    """Check a routing mode; ``prefix`` and ``context`` get a K of a quarter of the layers.

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
    """Return the first decoder layer that carries experts under a resolved routing mode."""
    match = _MODE_WITH_LAYER.fullmatch(routing)
    return int(match["layer"]) if match else 0


def reads_context(routing: str) -> bool:
    """Tell whether a resolved mode reads the mean over the tokens so far."""
    return routing.startswith("context")


class RouterHooks:
    """Lets a router set the routing weights of each forward that is given none.

    Args:
        causal_lm: The base model, already carrying routed LoRA layers.
        decoder: Its backbone and layers.
        routing: A resolved mode.
        router: One gate, or for ``per_layer`` one for each decoder layer.
        state: What the routed layers read; it gets these hooks.
        experts: Called in each forward: the indices of the experts to route among.

    Attributes:
        undo: Called when the hooks are taken off: what else was changed on the base model for them.

    Raises:
        ModelError: The backbone does not take the arguments that the mode has to read.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        decoder: Decoder,
        routing: str,
        router: DynamicHybridRouter,
        state: RoutingState,
        experts: Experts,
    ) -> None:
        self.mode = routing.partition(":")[0]
        self.router, self.experts, self.state, self.backbone = router, experts, state, decoder.backbone
        self._names = argument_names(decoder.backbone)
        if self.mode == "context" and "attention_mask" not in self._names:
            raise ModelError(
                f"routing 'context' has to read the attention_mask, and the {type(decoder.backbone).__name__} of "
                f"{type(causal_lm).__name__} takes none; use routing prefix:K or per_layer"
            )
        self._handles = [
            layer.register_forward_pre_hook(partial(self._at_layer, gate), with_kwargs=True)
            for gate, layer in enumerate(_layers_to_read(decoder, routing))
        ]
        self._gates = max(1, len(self._handles))
        decoder.backbone.routing = state  # type: ignore[assignment]
        extend(decoder.backbone, RoutedBackbone)
        self.undo: list[Callable[[], None]] = []
        state.hooks = self

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for undo in self.undo:
            undo()
        restore(self.backbone, RoutedBackbone)
        del self.backbone.routing
        self.state.hooks = None

    def check(self, call: Call) -> None:
        """Make sure that the router has set the weights of a forward that ended.

        Raises:
            RoutingError: It has not, since the model did not call the modules that it is hooked to.
        """
        if call.given or call.base_only or call.gates >= self._gates:
            return
        raise RoutingError(
            f"routing {self.mode!r}: {call.gates} of {self._gates} gates ran in a forward of "
            f"{type(call.module).__name__}, which did not call its decoder layers as it did when the mixture was made; "
            "load the mixture anew, and report it with the version of transformers if that does not help"
        )

    def run_backbone(self, call: Call, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone in a forward, and let the router's part of a cache come along.

        Args:
            call: The forward.
            run: The backbone's own forward.
            args: What the backbone was called with.
            kwargs: Likewise.

        Returns:
            The backbone's output.
        """
        if not call.base_only and not call.given:
            if self.mode == "final":
                return self._run_twice(call, run, named_arguments(self._names, args, kwargs))
            if self.mode == "context":
                return self._run_with_context(call, run, named_arguments(self._names, args, kwargs))
        return run(*args, **kwargs)

    def _run_twice(self, call: Call, run: Run, arguments: dict[str, Any]) -> Any:
        """Run the base alone for the router, then the mixture, each with a cache of its own."""
        name, cache = _cache_among(arguments)
        part: BasePass | None = part_of(cache, BasePass, self.mode)
        base_cache = part.cache if part is not None else None if cache is None else empty_copy(cache)
        base_arguments = {**arguments, "output_hidden_states": False, "output_attentions": False}
        if base_cache is not None:
            base_arguments[name] = base_cache
        call.base_only = True
        try:
            # the features must not depend on dropout
            with torch.no_grad(), evaluating(self.backbone):
                base_output = run(**base_arguments)
        finally:
            call.base_only = False
        self._route(call, base_output[0])
        output = run(**arguments)
        cache, base_cache = _cache_of(output, cache), _cache_of(base_output, base_cache)
        if cache is not None and base_cache is not None:
            carry(cache, part or BasePass(base_cache))
        return output

    def _run_with_context(self, call: Call, run: Run, arguments: dict[str, Any]) -> Any:
        """Run the mixture, the sums over the tokens so far in its cache."""
        cache = _cache_among(arguments)[1]
        part: ContextPart | None = part_of(cache, ContextPart, self.mode)
        mask = arguments.get("attention_mask") if call.token_mask is None else call.token_mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
            raise RoutingError(
                "routing 'context' needs an attention_mask of shape (batch, seq) or (batch, 1, seq, seq), got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        call.context = Context(mask, arguments.get("position_ids"), part)
        output = run(**arguments)
        cache = _cache_of(output, cache)
        if cache is not None and call.sums is not None:
            part = part or ContextPart()
            part.append(call.sums)
            carry(cache, part)
        return output

    def _at_layer(self, gate: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.state.call
        if call is None or call.base_only or call.given:
            return
        hidden = hidden_states_of(args, kwargs)
        if self.mode == "context":
            call.sums = running_sums(hidden, call.context)
            hidden = means(call.sums)
        self._route(call, hidden, gate)

    def _route(self, call: Call, hidden: Tensor, gate: int = 0) -> None:
        call.gates += 1
        routed = self.experts()
        if call.record is None and (expert := self.router.choose_one(hidden, gate, routed)) is not None:
            call.weights = one_expert(expert, len(routed))
            return
        output = self.router(hidden, gate, routed)
        call.weights = TokenWeights(output.weights, output.chosen)
        if call.record is not None:
            call.record.outputs.append(output)


def make_router(
    experts: ExpertManager,
    routing: str,
    num_experts: int,
    top_k: int,
    temperature: float,
    blocks: Sequence[int] | None,
) -> DynamicHybridRouter:
    """Return a new router for a mixture.

    Args:
        experts: The mixture's; there may be none yet.
        routing: A resolved mode.
        num_experts: How many experts there will be.
        top_k: Experts per token when routing is sparse.
        temperature: Divides the router's logits.
        blocks: How many of the experts each block of layers carries; see ``expert.carried_by_layers``.

    Raises:
        RoutingError: A number is out of its range.
    """
    base = experts.base_model
    gates = len(experts.decoder.layers) if routing == "per_layer" else 1
    carried = None if blocks is None else carried_by_layers(blocks, gates)
    hidden_size = experts.decoder.output_width if routing == "final" else experts.decoder.layer_width
    return DynamicHybridRouter(hidden_size, num_experts, top_k, temperature, gates, carried).to(device_of(base))


def _layers_to_read(decoder: Decoder, routing: str) -> list[nn.Module]:
    """Return the decoder layers whose input a gate reads, in the order of the gates."""
    if routing == "final":
        return []
    return list(decoder.layers) if routing == "per_layer" else [decoder.layers[prefix_layer(routing)]]


def _cache_among(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the argument that is a cache; what it is called depends on transformers."""
    for name, value in arguments.items():
        if isinstance(value, Cache) or (name in _CACHE_NAMES and value is not None):
            return name, value
    return "", None


_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a cache that is no ``transformers.Cache`` comes under, so that it is refused and not overlooked."""


def _cache_of(output: Any, given: Cache | None) -> Cache | None:
    """Return the cache that a forward ended with: the one that it was given, or the one that it made."""
    if given is not None:
        return given
    values = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)
