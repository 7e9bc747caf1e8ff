"""The forward of a causal language model and of its backbone as one ``ForwardCall``, begun and ended here.

Both are extended at ``__call__`` and at ``forward``: the first runs whatever hooks or wrappers a module carries, and
some libraries call the second directly.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dylo_moe.core.lora.extension import Extension
from dylo_moe.core.lora.state import ForwardCall, Hooks, RoutingState, Run
from dylo_moe.errors import RoutingError


class _RoutedModule(Extension):
    """What the methods here use of the module that they extend.

    Attributes:
        routing: State that its routed layers share.
    """

    routing: RoutingState
    training: bool
    modules: Callable[[], Iterator[Any]]


class RoutedCausalLM(_RoutedModule):
    """Methods that a causal language model gains: ``routing_weights`` is an argument of its forward."""

    overrides = ("__call__", "forward", "prepare_inputs_for_generation")

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run a forward as one call."""
        return _run_causal_lm(self, self.extended_from.__call__, args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run a forward as one call, unless ``__call__`` has begun it."""
        call = self.routing.call
        if call is not None and call.running == [self]:
            call.running.append(self)  # a second forward within this one is another call
            return self.extended_from.forward(self, *args, **kwargs)
        return _run_causal_lm(self, self.extended_from.forward, args, kwargs)

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> object:
        """Keep the mask of real tokens where the model is given a mask of another form for its cache."""
        inputs = self.extended_from.prepare_inputs_for_generation(self, *args, **kwargs)
        mask, other = kwargs.get("attention_mask"), inputs.get("attention_mask")
        if other is not None and not _is_token_mask(other):
            tokens = inputs.get("input_ids")
            tokens = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
            inputs["token_mask"] = mask if _is_token_mask(mask) else torch.ones_like(tokens, dtype=torch.long)
        return inputs


class RoutedBackbone(_RoutedModule):
    """Methods that the backbone of a mixture gains: the router's part of a forward."""

    overrides = ("__call__", "forward")

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the backbone, within the call of its causal LM or as a call of its own."""
        return _run_backbone(self, self.extended_from.__call__, args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the backbone, unless ``__call__`` has begun it."""
        call = self.routing.call
        if call is not None and self in call.running:
            return self.extended_from.forward(self, *args, **kwargs)
        return _run_backbone(self, self.extended_from.forward, args, kwargs)


def _run_causal_lm(model: RoutedCausalLM, method: Run, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Run a method of a causal LM as one call, with the routing weights among its arguments."""
    state = model.routing
    weights, mask = kwargs.pop("routing_weights", None), kwargs.pop("token_mask", None)
    if weights is not None:
        weights = check_weights(weights)
    elif state.scope.weights is not None and state.call is None:
        weights = _slice_weights(state.scope.weights, args, kwargs)
    if state.route_new_adapters is not None and (weights is not None or state.hooks is not None):
        state.route_new_adapters()
    call = _new_call(state, model, weights)
    call.token_mask = mask if isinstance(mask, Tensor) else None
    if call.stack_cache is not None:
        call.stack_cache.drop_if_stale()
    if model.training:
        _keep_routing_in_recomputation(state, model)
    with state.forward(call):
        output = method(model, *args, **kwargs)
    if state.hooks is not None:
        state.hooks.check(call)
    return output


def _run_backbone(backbone: RoutedBackbone, method: Run, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Run a method of a backbone, within the call that runs or as a call of its own."""
    state, hooks = backbone.routing, backbone.routing.hooks
    assert hooks is not None  # they extended it

    def run(*args: object, **kwargs: object) -> object:
        return method(backbone, *args, **kwargs)

    call = state.call
    if call is not None:
        return _run_within(call, hooks, backbone, run, args, kwargs)
    call = _new_call(state, backbone, None)
    if backbone.training:  # without its causal LM, as TRL runs it
        _keep_routing_in_recomputation(state, backbone)
    with state.forward(call):
        output = _run_within(call, hooks, backbone, run, args, kwargs)
    hooks.check(call)
    return output


def _run_within(
    call: ForwardCall,
    hooks: Hooks,
    backbone: RoutedBackbone,
    run: Run,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    """Run a backbone by the router's hooks, as part of a call."""
    before, call.running = call.running, [*call.running, backbone]
    output = hooks.run_backbone(call, run, args, kwargs)
    call.running = before
    if call.record is not None and call.record.wants_features:
        call.record.features = output[0]
    return output


def _new_call(state: RoutingState, module: _RoutedModule, weights: Tensor | None) -> ForwardCall:
    """Return a call for a forward that begins now."""
    scope = state.scope
    if state.call is not None:
        scope = scope._replace(record=None)  # the record is of the outer forward
    call = ForwardCall(module, scope, weights)
    call.running.append(module)
    return call


def check_weights(weights: object) -> Tensor:
    """Return routing weights; raise ``RoutingError`` unless they are a tensor of three dimensions."""
    if not isinstance(weights, Tensor) or weights.dim() != 3:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise RoutingError(f"`routing_weights` must be a tensor (batch, seq, num_active_experts), got {got}")
    return weights


def _slice_weights(weights: Tensor, args: tuple[object, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the part of a generation's routing weights that one forward needs.

    Args:
        weights: ``(rows, tokens, num_active_experts)``. Each row serves the rows that ``generate`` makes of it, such as
            beams. Tokens may be 1 for all; the last weights also serve the tokens after them.
        args: Arguments of the causal LM.
        kwargs: Keyword arguments of the causal LM.
    """
    tokens: Any = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    rows, length = tokens.shape[:2]
    if rows % len(weights) == 0 and len(weights) > 1:
        weights = weights.repeat_interleave(rows // len(weights), dim=0)
    if weights.shape[1] == 1:
        return weights
    past = next((int(value.get_seq_length()) for value in kwargs.values() if isinstance(value, Cache)), 0)
    positions = torch.arange(past, past + length, device=weights.device)
    return weights[:, positions.clamp(max=weights.shape[1] - 1)]


def _is_token_mask(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _keep_routing_in_recomputation(state: RoutingState, model: _RoutedModule) -> None:
    """Let gradient checkpointing run a layer again, in the backward pass, with the weights of its first run."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, RoutedCheckpoint):
            module._gradient_checkpointing_func = RoutedCheckpoint(state, checkpoint)


class RoutedCheckpoint:
    """Gradient-checkpointing function that carries the call of the first run into the second.

    Args:
        state: State of the model's routed layers.
        checkpoint: The function that the model would use.
    """

    def __init__(self, state: RoutingState, checkpoint: Run) -> None:
        self.state = state
        self.checkpoint = checkpoint

    def __call__(self, function: Run, *args: object, **kwargs: object) -> object:
        """Run ``function`` under gradient checkpointing."""
        call = self.state.call
        if call is None:
            return self.checkpoint(function, *args, **kwargs)
        entered = call.for_recomputation()

        def in_call(*inputs: object, **options: object) -> object:
            if self.state.call is call:
                call.drop_derived()
                output = function(*inputs, **options)
                call.drop_derived()
                return output
            with self.state.forward(entered.for_recomputation()):
                return function(*inputs, **options)

        return self.checkpoint(in_call, *args, **kwargs)
