"""What a causal language model and its backbone gain: a forward that is one call, begun and ended in one place.

Both are extended at ``__call__`` and at ``forward``: the first is run whatever hooks or wrappers a module carries, and
the second is called directly by some libraries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dylo_moe.core.extension import Extension
from dylo_moe.core.routing_state import Call, RoutingState
from dylo_moe.errors import RoutingError

Run = Callable[..., Any]


class RoutedCausalLM(Extension):
    """What a causal language model gains: ``routing_weights`` as an argument.

    Attributes:
        routing: What its routed layers share.
    """

    overrides = ("__call__", "forward", "prepare_inputs_for_generation")
    routing: RoutingState

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a forward as one call."""
        return _run_causal_lm(self, self.extended_from.__call__, args, kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a forward as one call, where it was not begun by ``__call__``."""
        call = self.routing.call
        if call is not None and call.inside == [self]:
            call.inside.append(self)  # a second forward within this one is another call
            return self.extended_from.forward(self, *args, **kwargs)
        return _run_causal_lm(self, self.extended_from.forward, args, kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the mask that says which tokens are real, where the model is given another one for its cache."""
        inputs = self.extended_from.prepare_inputs_for_generation(self, *args, **kwargs)
        mask, other = kwargs.get("attention_mask"), inputs.get("attention_mask")
        if other is not None and not _is_token_mask(other):
            tokens = inputs.get("input_ids")
            tokens = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
            inputs["token_mask"] = mask if _is_token_mask(mask) else torch.ones_like(tokens, dtype=torch.long)
        return inputs


class RoutedBackbone(Extension):
    """What the backbone of a mixture gains: the router's part of a forward.

    Attributes:
        routing: What its routed layers share.
    """

    overrides = ("__call__", "forward")
    routing: RoutingState

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone, within the call of its causal LM or as one of its own."""
        return _run_backbone(self, self.extended_from.__call__, args, kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone, where it was not begun by ``__call__``."""
        call = self.routing.call
        if call is not None and self in call.inside:
            return self.extended_from.forward(self, *args, **kwargs)
        return _run_backbone(self, self.extended_from.forward, args, kwargs)


def _run_causal_lm(model: Any, method: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: RoutingState = model.routing
    weights, mask = kwargs.pop("routing_weights", None), kwargs.pop("token_mask", None)
    if weights is not None:
        weights = check_weights(weights)
    elif state.scope.weights is not None and state.call is None:
        weights = _weights_of_a_text(state.scope.weights, args, kwargs)
    if state.take_up is not None and (weights is not None or state.hooks is not None):
        state.take_up()
    call = _new_call(state, model, weights)
    call.token_mask = mask
    if call.kept is not None:
        call.kept.drop_if_stale()
    if model.training:
        _keep_routing_in_recomputation(state, model)
    with state.forward(call):
        output = method(model, *args, **kwargs)
    if state.hooks is not None:
        state.hooks.check(call)
    return output


def _run_backbone(backbone: Any, method: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: RoutingState = backbone.routing

    def run(*args: Any, **kwargs: Any) -> Any:
        return method(backbone, *args, **kwargs)

    call = state.call
    if call is not None:
        return _within(call, backbone, run, args, kwargs)
    call = _new_call(state, backbone, None)
    if backbone.training:  # without its causal LM, as TRL runs it
        _keep_routing_in_recomputation(state, backbone)
    with state.forward(call):
        output = _within(call, backbone, run, args, kwargs)
    state.hooks.check(call)
    return output


def _within(call: Call, backbone: Any, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before, call.inside = call.inside, [*call.inside, backbone]
    output = backbone.routing.hooks.run_backbone(call, run, args, kwargs)
    call.inside = before
    if call.record is not None and call.record.wants_features:
        call.record.features = output[0]
    return output


def _new_call(state: RoutingState, module: nn.Module, weights: Tensor | None) -> Call:
    scope = state.scope
    if state.call is not None:
        scope = scope._replace(record=None)  # what is recorded is the forward around this one
    call = Call(module, scope, weights)
    call.inside.append(module)
    return call


def check_weights(weights: Any) -> Tensor:
    """Return routing weights; raise ``RoutingError`` unless they are a tensor of three dimensions."""
    if not isinstance(weights, Tensor) or weights.dim() != 3:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise RoutingError(f"routing_weights must be a tensor (batch, seq, num_active_experts), got {got}")
    return weights


def _weights_of_a_text(weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the part for one forward of the routing weights for a whole generation.

    Args:
        weights: ``(rows, tokens, num_active_experts)``. A row serves as many rows of the forward as ``generate`` makes
            of it. Tokens may be 1 for all; tokens beyond the last go as the last one does.
        args: What the causal LM was called with.
        kwargs: Likewise.
    """
    tokens: Any = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    rows, length = tokens.shape[:2]
    if rows % len(weights) == 0 and len(weights) > 1:
        weights = weights.repeat_interleave(rows // len(weights), dim=0)
    if weights.shape[1] == 1:
        return weights
    past = next((int(value.get_seq_length()) for value in kwargs.values() if isinstance(value, Cache)), 0)
    places = torch.arange(past, past + length, device=weights.device)
    return weights[:, places.clamp(max=weights.shape[1] - 1)]


def _is_token_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _keep_routing_in_recomputation(state: RoutingState, model: nn.Module) -> None:
    """Let gradient checkpointing run a layer a second time, in the backward pass, with the weights it had."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, RoutedCheckpoint):
            module._gradient_checkpointing_func = RoutedCheckpoint(state, checkpoint)  # type: ignore[assignment]


class RoutedCheckpoint:
    """A gradient-checkpointing function that carries the call of the first run into the second."""

    def __init__(self, state: RoutingState, checkpoint: Run) -> None:
        self.state = state
        self.checkpoint = checkpoint

    def __call__(self, function: Run, *args: Any, **kwargs: Any) -> Any:
        """Run ``function`` under gradient checkpointing."""
        call = self.state.call
        if call is None:
            return self.checkpoint(function, *args, **kwargs)
        entered = call.again()

        def in_call(*inputs: Any, **options: Any) -> Any:
            if self.state.call is call:
                call.derive_anew()
                output = function(*inputs, **options)
                call.derive_anew()
                return output
            with self.state.forward(entered.again()):
                return function(*inputs, **options)

        return self.checkpoint(in_call, *args, **kwargs)
