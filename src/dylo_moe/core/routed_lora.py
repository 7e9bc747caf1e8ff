"""The routed LoRA layer on unmodified PEFT: ``model(input_ids, routing_weights=w)``.

``enable_routing`` gives the LoRA layers of a PEFT model a forward that mixes the active adapters by per-token
weights, in the way that ``torch.nn.utils.parametrize`` extends a module: the module's class becomes a subclass of
its own class. Parameters, names, files and every other PEFT method stay what they were, quantised base layers
included. Where no weights are given, PEFT's own forward runs.

Not covered: LoRA variants that do not add ``B A x`` (DoRA and others), LoRA on embeddings and convolutions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from dylo_moe.core.router import RouterOutput
from dylo_moe.errors import RoutingError

_NOT_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper)


def routed_delta(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    routing_weights: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``sum_e w[t, e] * s_e * B_e A_e x_t`` with one matmul down and one up, for any number of experts.

    Args:
        x: ``(..., in_features)``.
        lora_a: A matrix ``(rank_e, in_features)`` for each expert; ranks may differ.
        lora_b: A matrix ``(out_features, rank_e)`` for each expert.
        scalings: The factor ``s_e`` of each expert.
        routing_weights: ``(..., num_experts)``, broadcastable to the leading dimensions of ``x``.
        dropout: Applied to ``x`` once; the experts share the mask.

    Returns:
        ``(..., out_features)`` in the dtype of ``x``.
    """
    down = torch.cat(list(lora_a))
    up = torch.cat(list(lora_b), dim=1)
    ranks = tuple(a.shape[0] for a in lora_a)
    rank_space = F.linear(x if dropout is None else dropout(x), down)
    spread = _spread(ranks, tuple(scalings), rank_space.dtype, rank_space.device)
    per_rank = routing_weights.to(rank_space.dtype) @ spread
    return F.linear(rank_space * per_rank, up)


@cache
def _spread(ranks: tuple[int, ...], scalings: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(num_experts, sum of ranks)``: row e holds ``s_e`` on the columns of expert e. Spreads weights over ranks."""
    # a tensor that was made in inference mode could not take part in training later
    with torch.inference_mode(False):
        rows = [torch.full((rank,), scaling, dtype=dtype) for rank, scaling in zip(ranks, scalings, strict=True)]
        spread: Tensor = torch.block_diag(*rows)
        return spread.to(device)


class RoutingState:
    """What the routed layers of one model share while a forward runs.

    Attributes:
        weights: ``(batch, seq, num_active_experts)`` for the layers that run next; None for plain PEFT.
        base_only: Whether the layers leave out every adapter.
        given: Whether ``weights`` came from the caller, so that no router may replace them.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.base_only = False
        self.given = False
        self.record: list[RouterOutput] | None = None

    @contextmanager
    def scope(self, weights: Tensor | None = None, *, given: bool = False, base_only: bool = False) -> Iterator[None]:
        """Sets the state for a block of code, and restores what was there before."""
        before = self.weights, self.given, self.base_only
        self.weights, self.given, self.base_only = weights, given, base_only
        try:
            yield
        finally:
            self.weights, self.given, self.base_only = before

    @contextmanager
    def recording(self) -> Iterator[list[RouterOutput]]:
        """Collects what the router gave in one forward, for each gate in order."""
        before, self.record = self.record, []
        try:
            yield self.record
        finally:
            self.record = before


class RoutedLayer:
    """What a PEFT LoRA layer gains; mixed into the layer's own class by ``enable_routing``."""

    routing: RoutingState
    plain_forward: Callable[..., Tensor]

    def routed_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the routed mixture of the active adapters that this layer has."""
        state = self.routing
        if self.merged and (state.base_only or state.weights is not None):
            raise RoutingError(
                f"the adapters {self.merged_adapters} are merged into the base; call unmerge_adapter() first to route"
            )
        if state.base_only:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if state.weights is None or self.disable_adapters:
            return self.plain_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        weights = state.weights
        _check_weights(weights, x, self.active_adapters)
        present = [index for index, name in enumerate(self.active_adapters) if name in self.lora_A]
        if not present:
            return result
        if len(present) < len(self.active_adapters):
            weights = weights[..., present]
        names = [self.active_adapters[index] for index in present]
        mixture: Tensor = self._mixture(x, names, weights)
        return (result + mixture).to(result.dtype)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """As PEFT's, but which experts train is left alone: the end of ``disable_adapter`` must not unfreeze any."""
        self._disable_adapters = not enabled

    def _mixture(self: Any, x: Tensor, names: Sequence[str], weights: Tensor) -> Tensor:
        """``(..., out_features)``: one fused product for each distinct dropout rate, as a rule one in all."""
        by_rate: dict[float, list[int]] = {}
        for index, name in enumerate(names):
            rate = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
            by_rate.setdefault(rate, []).append(index)
        x = self._cast_input_dtype(x, self.lora_A[names[0]].weight.dtype)
        parts = []
        for indices in by_rate.values():
            chosen = [names[index] for index in indices]
            parts.append(
                routed_delta(
                    x,
                    [self.lora_A[name].weight for name in chosen],
                    [self.lora_B[name].weight for name in chosen],
                    [self.scaling[name] for name in chosen],
                    weights if len(by_rate) == 1 else weights[..., indices],
                    self.lora_dropout[chosen[0]],
                )
            )
        return functools.reduce(torch.add, parts)


def enable_routing(model: PeftModel) -> RoutingState:
    """Makes ``routing_weights`` an argument of a PEFT model with LoRA adapters.

    ``model(input_ids, routing_weights=w)`` then mixes the active adapters by ``w``, of shape
    ``(batch, seq, num_active_adapters)`` in the order of ``model.active_adapters``, with gradients to ``w``.
    One-hot weights equal that adapter alone, all-zero weights equal the base. Without the argument the model is
    PEFT as before. May be called again after adapters were added: only layers that are new are changed.

    Returns:
        The state that the routed layers share.

    Raises:
        RoutingError: The model has no LoRA layer, or one that cannot be routed.
    """
    causal_lm = model.get_base_model()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise RoutingError(f"routing needs a model with LoRA adapters, and {type(model).__name__} has none")
    for name, layer in layers:
        _check_layer(name, layer)
    state = next((layer.routing for _, layer in layers if isinstance(layer, RoutedLayer)), None)
    if state is None:
        state = RoutingState()
        causal_lm.register_forward_pre_hook(partial(_take_weights, state), with_kwargs=True, prepend=True)
        causal_lm.register_forward_hook(partial(_drop_weights, state), always_call=True)
    for _, layer in layers:
        if not isinstance(layer, RoutedLayer):
            layer.__class__ = _routed_class(type(layer))
            layer.routing = state  # type: ignore[attr-defined]
    return state


@cache
def _routed_class(lora_class: type[LoraLayer]) -> type[LoraLayer]:
    # The layer's own class comes first: an object may only move to a class of the same layout.
    namespace = {
        "forward": RoutedLayer.routed_forward,
        "plain_forward": lora_class.forward,  # type: ignore[attr-defined]
        "enable_adapters": RoutedLayer.enable_adapters,
    }
    return type(f"Routed{lora_class.__name__}", (lora_class, RoutedLayer), namespace)


def _take_weights(
    state: RoutingState, causal_lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # The argument is taken off before the base model sees it: it knows of no routing.
    weights = kwargs.pop("routing_weights", None)
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.dim() != 3:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise RoutingError(f"routing_weights must be a tensor (batch, seq, num_active_experts), got {got}")
        state.weights, state.given = weights, True
    if causal_lm.training:
        _keep_routing_in_recomputation(state, causal_lm)
    return args, kwargs


def _drop_weights(state: RoutingState, causal_lm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state.weights, state.given = None, False


def _keep_routing_in_recomputation(state: RoutingState, causal_lm: nn.Module) -> None:
    """Lets gradient checkpointing run a layer a second time, in the backward pass, with the weights it had."""
    for module in causal_lm.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _RoutedCheckpoint):
            module._gradient_checkpointing_func = _RoutedCheckpoint(state, checkpoint)  # type: ignore[assignment]


class _RoutedCheckpoint:
    """A gradient-checkpointing function that carries the routing of the first run into the second."""

    def __init__(self, state: RoutingState, checkpoint: Callable[..., Any]) -> None:
        self.state = state
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing = self.state.scope
        weights, given, base_only = self.state.weights, self.state.given, self.state.base_only

        def with_routing(*inputs: Any, **options: Any) -> Any:
            with routing(weights, given=given, base_only=base_only):
                return function(*inputs, **options)

        return self.checkpoint(with_routing, *args, **kwargs)


def _check_layer(name: str, layer: LoraLayer) -> None:
    if layer.lora_variant:
        adapter, variant = next(iter(layer.lora_variant.items()))
        raise RoutingError(
            f"adapter {adapter!r} uses {type(variant).__name__} at {name}; only plain LoRA and rsLoRA can be routed"
        )
    if any(layer.lora_bias.values()):
        raise RoutingError(f"lora_bias is set at {name}; train the adapter with lora_bias=False to route it")
    if isinstance(layer, _NOT_LINEAR):
        kind = type(layer).__name__
        raise RoutingError(f"{name} is adapted by PEFT's {kind}; only linear layers can be routed, leave it out")


def _check_weights(weights: Tensor, x: Tensor, active: Sequence[str]) -> None:
    if weights.shape[-1] != len(active):
        raise RoutingError(
            f"routing_weights have {weights.shape[-1]} columns, but {len(active)} adapters are active: "
            + ", ".join(active)
        )
    if any(given not in (1, wanted) for given, wanted in zip(weights.shape[:-1], x.shape[:-1], strict=False)):
        raise RoutingError(
            f"routing_weights are {tuple(weights.shape)}, but the hidden states are {tuple(x.shape)}; "
            "the first two dimensions must be batch and seq of the same forward"
        )
