"""Hooks by which the router reads its input on an unmodified base model; ``routing_mode`` lists the modes.

Training, evaluation and ``generate`` all run the backbone and its decoder layers, so there is one path. The weights of
a token depend on its own hidden state only, and so on no later token.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from dylo_moe.core.base import Decoder, argument_names, device_of, evaluating, hidden_states_of, named_arguments
from dylo_moe.core.lora import (
    ExpertManager,
    ForwardCall,
    RoutedBackbone,
    RoutesFound,
    RoutingState,
    Run,
    TokenWeights,
    experts_per_layer,
    extend,
    one_hot_weights,
    restore,
)
from dylo_moe.core.routing.caches import BaseContextPart, BasePass, ContextPart, RunningSums, carry, empty_copy, part_of
from dylo_moe.core.routing.context import Context, means, running_sums
from dylo_moe.core.routing.router import SUM_TO_ONE, DynamicHybridRouter
from dylo_moe.errors import ModelError, RoutingError
from dylo_moe.spec import RoutingMode


class RouterHooks:
    """Hooks by which a router sets the routing weights of each forward that is given none.

    ``run_backbone`` runs once a forward, ``_at_layer`` before each decoder layer that the mode reads. Modes that need
    more than that have a method of their own: ``_run_base_first`` (``final``), ``_run_with_context`` (``context``) and
    ``_run_base_layers_first`` (``base_context``).

    Args:
        causal_lm: The base model, with its routed LoRA layers.
        decoder: Its backbone and layers.
        mode: Where the router reads.
        router: Router with one gate, or under ``per_layer`` one for each decoder layer.
        state: State that the routed layers share; it gets these hooks.
        active_expert_indices: Called in each forward, returns the indices of the experts to route among.

    Attributes:
        undo: Called when the hooks are removed, to undo what else was changed on the base model for them.

    Raises:
        ModelError: The backbone does not take the arguments that the mode reads.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        decoder: Decoder,
        mode: RoutingMode,
        router: DynamicHybridRouter,
        state: RoutingState,
        active_expert_indices: Callable[[], Sequence[int]],
    ) -> None:
        self.kind = mode.kind.value
        self.router, self.state, self.backbone = router, state, decoder.backbone
        self.active_expert_indices = active_expert_indices
        self._reads_base_output, self._reads_context = mode.reads_base_output, mode.reads_context
        self._reads_base_alone, self._layer = mode.reads_base_alone, mode.layer
        self._argument_names = argument_names(decoder.backbone)
        if self._reads_context and "attention_mask" not in self._argument_names:
            raise ModelError(
                f"`routing` {self.kind!r} reads the attention_mask, and the {type(decoder.backbone).__name__} of "
                f"{type(causal_lm).__name__} does not take one; use prefix:K or per_layer"
            )
        self._handles = [
            decoder.layers[layer].register_forward_pre_hook(partial(self._at_layer, gate), with_kwargs=True)
            for gate, layer in enumerate(mode.layers_read(len(decoder.layers)))
        ]
        self._num_gates = mode.num_gates(len(decoder.layers))
        extend(self.backbone, RoutedBackbone, routing=state)
        self.undo: list[Callable[[], None]] = []
        state.hooks = self

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for undo in self.undo:
            undo()
        restore(self.backbone, RoutedBackbone)
        del self.backbone.routing
        self.state.hooks = None

    def check(self, call: ForwardCall) -> None:
        """Check that the router has set the weights of a forward that has ended.

        Raises:
            RoutingError: It has not, because the model did not call the modules that the hooks are on.
        """
        if call.weights_from_caller or call.base_only or call.gates_run >= self._num_gates:
            return
        raise RoutingError(
            f"`routing` {self.kind!r}: {call.gates_run} of {self._num_gates} gates ran in a forward of "
            f"{type(call.module).__name__}, which did not call its decoder layers as it did when the mixture was made; "
            "load the mixture again, and report it with the version of transformers if that does not help"
        )

    def run_backbone(self, call: ForwardCall, run: Run, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Run the backbone in a forward, and let its cache carry along what the router needs.

        Args:
            call: The forward.
            run: The backbone's own forward.
            args: Arguments of the backbone.
            kwargs: Keyword arguments of the backbone.

        Returns:
            The backbone's output.
        """
        if not call.base_only and not call.weights_from_caller:
            if self._reads_base_output:
                return self._run_base_first(call, run, named_arguments(self._argument_names, args, kwargs))
            if self._reads_base_alone:
                return self._run_base_layers_first(call, run, named_arguments(self._argument_names, args, kwargs))
            if self._reads_context:
                return self._run_with_context(call, run, named_arguments(self._argument_names, args, kwargs))
        return run(*args, **kwargs)

    def _run_base_first(self, call: ForwardCall, run: Run, arguments: dict[str, object]) -> object:
        """Run the base alone for the router, then the mixture, each with its own cache."""
        name, cache = _cache_among(arguments)
        part: BasePass | None = part_of(cache, BasePass, self.kind)
        base_cache = part.cache if part is not None else None if cache is None else empty_copy(cache)
        base_output = self._run_base(call, run, arguments, {} if base_cache is None else {name: base_cache})
        self._route(call, base_output[0])
        output = run(**arguments)
        cache, base_cache = _cache_of(output, cache), _cache_of(base_output, base_cache)
        if cache is not None and base_cache is not None:
            carry(cache, part or BasePass(base_cache))
        return output

    def _run_base_layers_first(self, call: ForwardCall, run: Run, arguments: dict[str, object]) -> object:
        """Run the base's layers below K alone for the router, then the mixture, each with its own cache."""
        name, cache = _cache_among(arguments)
        part: BaseContextPart | None = part_of(cache, BaseContextPart, self.kind)
        if part is None and (cache is not None or arguments.get("use_cache") is not False):
            whole = DynamicCache(config=vars(self.backbone).get("config")) if cache is None else cache
            part = BaseContextPart(empty_copy(whole), self._layer or 0)
            name = name or next((one for one in _CACHE_NAMES if one in self._argument_names), "")
        call.router_input = self._context(call, arguments, None if part is None else part.context)
        with suppress(_BaseLayersDone):
            self._run_base(call, run, arguments, {} if part is None else {name: part.base.cache})
        call.router_input, sums = None, call.router_result
        if not isinstance(sums, RunningSums):  # the layer was not called
            self.check(call)
            return run(**arguments)
        self._route(call, means(sums))
        output = run(**arguments)
        cache = _cache_of(output, cache)
        if cache is not None and part is not None:
            part.context.append(sums)
            carry(cache, part)
        return output

    def _run_base(self, call: ForwardCall, run: Run, arguments: dict[str, object], cache: dict[str, Cache]) -> Any:
        """Run the backbone without adapters, gradients and dropout, with a cache of its own."""
        call.base_only = True
        try:
            with torch.no_grad(), evaluating(self.backbone):
                return run(**{**arguments, "output_hidden_states": False, "output_attentions": False, **cache})
        finally:
            call.base_only = False

    def _run_with_context(self, call: ForwardCall, run: Run, arguments: dict[str, object]) -> object:
        """Run the mixture, with the sums over the tokens so far in its cache."""
        cache = _cache_among(arguments)[1]
        part: ContextPart | None = part_of(cache, ContextPart, self.kind)
        call.router_input = self._context(call, arguments, part)
        output = run(**arguments)
        cache, sums = _cache_of(output, cache), call.router_result
        if cache is not None and isinstance(sums, RunningSums):
            part = part or ContextPart()
            part.append(sums)
            carry(cache, part)
        return output

    def _context(self, call: ForwardCall, arguments: dict[str, object], part: ContextPart | None) -> Context:
        mask = arguments.get("attention_mask") if call.token_mask is None else call.token_mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
            raise RoutingError(
                f"`routing` {self.kind!r} needs an attention_mask of shape (batch, seq) or (batch, 1, seq, seq), got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        positions = arguments.get("position_ids")
        return Context(mask, positions if isinstance(positions, Tensor) else None, part)

    def _at_layer(self, gate: int, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Route by the hidden states that enter a decoder layer."""
        call = self.state.call
        if call is None or call.weights_from_caller:
            return
        if self._reads_base_alone:
            if isinstance(call.router_input, Context):
                call.router_result = running_sums(hidden_states_of(args, kwargs), call.router_input)
                raise _BaseLayersDone
            return
        if call.base_only:
            return
        hidden_states = hidden_states_of(args, kwargs)
        if self._reads_context:
            context = call.router_input
            sums = running_sums(hidden_states, context if isinstance(context, Context) else Context())
            call.router_result, hidden_states = sums, means(sums)
        self._route(call, hidden_states, gate)

    def _route(self, call: ForwardCall, hidden_states: Tensor, gate: int = 0) -> None:
        """Set the routing weights for the layers that run next."""
        call.gates_run += 1
        experts = self.active_expert_indices()
        if call.record is None:
            column = self.router.top1_fast_path(hidden_states, gate, experts)
            if column is not None:
                call.weights = one_hot_weights(column, len(experts), self.state.has_shared_expert)
                return
        output = self.router(hidden_states, gate, experts)
        weights = TokenWeights(output.weights, output.topk_expert_ids)
        call.weights = weights.with_shared_expert() if self.state.has_shared_expert else weights
        if call.record is not None:
            call.record.router_logits.append(output.logits)
            call.record.routing_weights.append(output.weights)
            if call.record.ends_with_routes:
                raise RoutesFound


def make_router(
    experts: ExpertManager,
    mode: RoutingMode,
    num_experts: int,
    top_k: int,
    temperature: float,
    experts_per_block: Sequence[int] | None,
    expert_scale: str = SUM_TO_ONE,
) -> DynamicHybridRouter:
    """Return a new router for a mixture.

    Args:
        experts: The mixture's experts; there may be none yet.
        mode: Where the router will read.
        num_experts: Number of experts that there will be.
        top_k: Experts per token when routing is sparse.
        temperature: Divisor of the router's logits.
        experts_per_block: Number of experts that each block of layers carries; see ``targets.experts_per_layer``.
        expert_scale: See ``DynamicHybridRouter``.

    Raises:
        RoutingError: A number is out of its range.
    """
    decoder = experts.decoder
    num_gates = mode.num_gates(len(decoder.layers))
    experts_per_gate = None if experts_per_block is None else experts_per_layer(experts_per_block, num_gates)
    hidden_size = decoder.output_width if mode.reads_base_output else decoder.layer_width
    router = DynamicHybridRouter(
        hidden_size, num_experts, top_k, temperature, num_gates, experts_per_gate, expert_scale
    )
    return router.to(device_of(experts.base_model))


class _BaseLayersDone(Exception):
    """Ends the pass of the base alone at the layer whose input the router reads."""


_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Arguments that can be a cache of another class than ``transformers.Cache``, so that it is refused, not overlooked."""


def _cache_among(arguments: Mapping[str, object]) -> tuple[str, Any]:
    """Return name and value of the argument that is a cache; its name depends on the version of transformers."""
    for name, value in arguments.items():
        if isinstance(value, Cache) or (name in _CACHE_NAMES and value is not None):
            return name, value
    return "", None


def _cache_of(output: Any, given: Cache | None) -> Cache | None:
    """Return the cache after a forward: the given one, or else the one that the forward made."""
    if given is not None:
        return given
    values = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)
