"""The routed LoRA layer on unmodified PEFT: ``model(input_ids, routing_weights=w)``.

``enable_routing`` gives the LoRA layers of a PEFT model a forward that mixes the active adapters by per-token
weights, in the way that ``torch.nn.utils.parametrize`` extends a module: the module's class becomes a subclass of
its own class. Parameters, names, files and every other PEFT method stay what they were, quantised base layers
included. Where no weights are given, PEFT's own forward runs.

Not covered: LoRA variants that do not add ``B A x`` (DoRA and others), LoRA on embeddings and convolutions.
"""

import functools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from dylo_moe.core.mixture import (
    TokenWeights,
    add_of_one_token,
    add_product,
    has_sparse_product,
    pays_sparse,
    routed_delta,
    sparse_down,
    sparse_up,
    stack_rows,
)
from dylo_moe.core.routing_state import Experts, KeptStacks, RoutingState, Shared, Stack
from dylo_moe.errors import RoutingError

_NOT_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper)

# Layers that models feed the very same tensor. Only a hint: where it does not hold, each layer computes for itself.
_FED_ALIKE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class RoutedLayer:
    """What a PEFT LoRA layer gains; mixed into the layer's own class by ``enable_routing``."""

    routing: RoutingState
    plain_forward: Callable[..., Tensor]
    fed_alike: "tuple[RoutedLayer, ...]"

    def routed_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the routed mixture of the active adapters that this layer has."""
        state = self.routing
        weights = state.weights
        if self.merged and (state.base_only or weights is not None):
            raise RoutingError(
                f"the adapters {self.merged_adapters} are merged into the base; call unmerge_adapter() first to route"
            )
        if state.base_only:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if weights is None or self.disable_adapters:
            return self.plain_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        _check_weights(weights.weights, x, self.active_adapters)
        return self._add_mixture(result, x, weights)  # type: ignore[no-any-return]

    def _add_mixture(self: Any, result: Tensor, x: Tensor, weights: TokenWeights) -> Tensor:
        """The base layer's result plus the mixture, by the product that is the cheapest for these shapes."""
        no_grad = not torch.is_grad_enabled()
        # the output of a plain linear layer is nobody else's, unless a hook was there to keep it
        own = type(self.base_layer) is nn.Linear and not self.base_layer._forward_hooks
        sparse = no_grad and weights.chosen is not None and not self.training
        one_token = weights.of_one_token() if sparse else None
        if one_token is not None:
            return self._add_of_one_token(result, x, one_token, own)  # type: ignore[no-any-return]
        kept = self._kept()
        stack = kept and kept.stacks.get(self)
        experts = stack.experts if stack else self._experts()
        if not experts.names:
            return result
        if experts.places is not None:
            weights = weights.of(experts.places)
        elif sparse and pays_sparse(len(experts.names), weights.chosen.shape[-1]):  # type: ignore[union-attr]
            lora_a, lora_b = self._matrices(experts)
            if has_sparse_product(lora_a, lora_b, weights):
                delta: Tensor = self._mixture_of_chosen(x, experts, weights, lora_b)
                return (result + delta).to(result.dtype)
        if self.training and any(map(self._dropout_rate, experts.names)):
            dropped: Tensor = self._mixture_of_dropped(x, experts, weights)
            return (result + dropped).to(result.dtype)
        rank_space = self._rank_space(x, experts, weights)
        return add_product(result, rank_space, self._stack(experts).up, in_place=own)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """As PEFT's, but which experts train is left alone: the end of ``disable_adapter`` must not unfreeze any."""
        self._disable_adapters = not enabled

    def _experts(self: Any) -> Experts:
        active, ranks, scalings = self.active_adapters, self.r, self.scaling
        names = tuple([name for name in active if name in ranks])
        return Experts(
            None if len(names) == len(active) else tuple([active.index(name) for name in names]),
            names,
            tuple([ranks[name] for name in names]),
            tuple([scalings[name] for name in names]),
        )

    def _matrices(self: Any, experts: Experts) -> tuple[list[Tensor], list[Tensor]]:
        """The ``A`` and the ``B`` of each expert."""
        lora_a, lora_b, names = self.lora_A, self.lora_B, experts.names
        return [lora_a[name].weight for name in names], [lora_b[name].weight for name in names]

    def _kept(self: Any) -> KeptStacks | None:
        """Where stacks are kept; None where they are not, or where a gradient has to reach the weights."""
        return None if torch.is_grad_enabled() else self.routing.kept

    def _stack(self: Any, experts: Experts) -> Stack:
        kept = self._kept()
        stack: Stack | None = kept and kept.stacks.get(self)
        if stack is None:
            weights = [self.lora_B[name].weight for name in experts.names]
            stack = Stack(experts, torch.cat(weights, dim=1))
            if kept is not None:
                kept.stacks[self] = stack
                kept.note(weights)
        return stack

    def _siblings(self: Any, experts: Experts) -> "tuple[list[RoutedLayer], Tensor]":
        """The layers that are fed alike with the same experts, and all their ``A`` under each other."""
        kept = self._kept()
        siblings: tuple[list[RoutedLayer], Tensor] | None = kept and kept.siblings.get(self)
        if siblings is None:
            layers = self._fed_the_same()
            weights = [layer.lora_A[name].weight for layer in layers for name in experts.names]
            siblings = layers, stack_rows(weights)
            if kept is not None:
                kept.siblings[self] = siblings
                kept.note(weights)
        return siblings

    def _fed_the_same(self: Any) -> "list[RoutedLayer]":
        """The layers that are fed the same tensor, as far as names tell, and have the same experts; this one too."""
        return [layer for layer in self.fed_alike if layer is self or self._has_the_same_experts(layer)]

    def _has_the_same_experts(self: Any, other: Any) -> bool:
        alike = self.r == other.r and self.scaling == other.scaling
        return bool(alike and self.active_adapters == other.active_adapters)

    def _rank_space(self: Any, x: Tensor, experts: Experts, weights: TokenWeights) -> Tensor:
        """``(batch, seq, sum of ranks)``: ``A x`` of each expert times its weight; for all siblings at once."""

        def of_all() -> dict[Any, Tensor]:
            layers, down = self._siblings(experts)
            rank_space = F.linear(self._cast_input_dtype(x, down.dtype), down)
            per_rank = weights.per_rank(experts.ranks, experts.scalings, rank_space.dtype)
            if len(layers) == 1:
                return {self: rank_space * per_rank}
            split = rank_space.unflatten(-1, (len(layers), -1)) * per_rank.unsqueeze(-2)
            return dict(zip(layers, split.unbind(-2), strict=True))

        return self._own_part("dense", x, weights, of_all)  # type: ignore[no-any-return]

    def _own_part(
        self: Any, product: str, x: Tensor, weights: TokenWeights, of_all: Callable[[], dict[Any, Tensor]]
    ) -> Tensor:
        """This layer's part of what is computed once for all layers that are fed alike."""
        state = self.routing
        shared = state.shared
        if shared is not None and shared.product == product and shared.x is x and shared.weights is weights:
            part: Tensor | None = shared.parts.pop(self, None)
            if part is not None:
                return part
        parts = of_all()
        state.shared = Shared(product, x, weights, parts)
        return parts.pop(self)

    def _add_of_one_token(self: Any, result: Tensor, x: Tensor, chosen: list[tuple[int, float]], own: bool) -> Tensor:
        """The result with the chosen experts, straight from their own matrices."""
        for place, weight in chosen:
            name = self.active_adapters[place]
            if name in self.scaling:
                down, up = self.lora_A[name].weight, self.lora_B[name].weight
                scale = weight * self.scaling[name]
                x = self._cast_input_dtype(x, down.dtype)
                result = add_of_one_token(result, x, down, up, scale=scale, in_place=own)
        return result

    def _mixture_of_chosen(
        self: Any, x: Tensor, experts: Experts, weights: TokenWeights, lora_b: Sequence[Tensor]
    ) -> Tensor:
        """The mixture by the chosen experts alone; down to rank space for all siblings at once."""

        def of_all() -> dict[Any, Tensor]:
            layers = self._fed_the_same()
            lora_a = [layer.lora_A[name].weight for name in experts.names for layer in layers]
            cast = self._cast_input_dtype(x, lora_a[0].dtype)
            spaces = sparse_down(cast, lora_a, experts.scalings, weights, len(layers))
            return dict(zip(layers, spaces.unbind(1), strict=True))

        rank_space = self._own_part("sparse", x, weights, of_all)
        return sparse_up(rank_space, lora_b, weights).view(*x.shape[:-1], -1)

    def _mixture_of_dropped(self: Any, x: Tensor, experts: Experts, weights: TokenWeights) -> Tensor:
        """The mixture under dropout: one product for each distinct rate, as a rule one in all."""
        by_rate: dict[float, list[int]] = {}
        for index, name in enumerate(experts.names):
            by_rate.setdefault(self._dropout_rate(name), []).append(index)
        lora_a, lora_b = self._matrices(experts)
        x = self._cast_input_dtype(x, lora_a[0].dtype)
        parts = [
            routed_delta(
                x,
                [lora_a[index] for index in indices],
                [lora_b[index] for index in indices],
                [experts.scalings[index] for index in indices],
                weights.weights[..., indices],
                self.lora_dropout[experts.names[indices[0]]],
            )
            for indices in by_rate.values()
        ]
        return functools.reduce(torch.add, parts)

    def _dropout_rate(self: Any, name: str) -> float:
        return getattr(self.lora_dropout[name], "p", 0.0)


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
            layer.fed_alike = (layer,)  # type: ignore[attr-defined]
    _find_layers_fed_alike(causal_lm)
    return state


def _find_layers_fed_alike(causal_lm: nn.Module) -> None:
    for module in causal_lm.modules():
        children = dict(module.named_children())
        for names in _FED_ALIKE:
            found = [children[name] for name in names if isinstance(children.get(name), RoutedLayer)]
            for layer in found:
                layer.fed_alike = tuple(found)  # type: ignore[assignment]


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
        state.weights, state.given = TokenWeights(weights), True
    if state.kept is not None:
        state.kept.drop_if_stale()
    if causal_lm.training:
        _keep_routing_in_recomputation(state, causal_lm)
    return args, kwargs


def _drop_weights(state: RoutingState, causal_lm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state.forget()


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
            # a copy, so that each run derives for itself what the layers need: both runs must save the same tensors
            own = weights and TokenWeights(weights.weights, weights.chosen)
            with routing(own, given=given, base_only=base_only):
                output = function(*inputs, **options)
            self.state.shared = None
            return output

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
    if weights.shape[:-1] == x.shape[:-1]:
        return
    if any(given not in (1, wanted) for given, wanted in zip(weights.shape[:-1], x.shape[:-1], strict=False)):
        raise RoutingError(
            f"routing_weights are {tuple(weights.shape)}, but the hidden states are {tuple(x.shape)}; "
            "the first two dimensions must be batch and seq of the same forward"
        )
