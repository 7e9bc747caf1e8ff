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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from transformers import Cache

from dylo_moe.core.mixture import TokenWeights, add_product, pays_sparse, routed_delta, sparse_delta
from dylo_moe.core.router import RouterOutput
from dylo_moe.errors import RoutingError

_NOT_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper)

# Layers that models feed the very same tensor. Only a hint: where it does not hold, each layer computes for itself.
_FED_ALIKE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class Experts(NamedTuple):
    """The active experts of one layer.

    Attributes:
        places: Where they stand among the model's active adapters; None where the layer has them all.
        names: Their names.
        ranks: Rank of each.
        scalings: Scaling of each.
    """

    places: tuple[int, ...] | None
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class Siblings(NamedTuple):
    """Layers that are fed the same tensor, and their ``A`` as one matrix, ``(layers * sum of ranks, in_features)``."""

    layers: "tuple[RoutedLayer, ...]"
    down: Tensor


class Stacks:
    """Stacked weights. They live as long as one forward, and through decoding steps that continue its cache."""

    def __init__(self) -> None:
        self.up: dict[RoutedLayer, tuple[Experts, Tensor]] = {}
        self.siblings: dict[RoutedLayer, Siblings] = {}
        self._made_from: list[object] = []

    def clear(self) -> None:
        """Forgets everything."""
        self.up.clear()
        self.siblings.clear()
        self._made_from.clear()

    def seal(self) -> None:
        """Notes what the stacks were made from, for ``still_valid``."""
        if not self._made_from:
            self._made_from = self._sources()

    def still_valid(self) -> bool:
        """Whether there are stacks, and nothing that they were made from changed since."""
        return bool(self.up) and self._made_from == self._sources()

    def _sources(self) -> list[object]:
        # read in every decoding step, so by the shortest way to the parameters: a second would be some percent
        sources: list[object] = []
        for layer, (experts, _) in self.up.items():
            sources += (*layer.active_adapters, *layer.scaling.values())  # type: ignore[attr-defined]
            for side in (layer.lora_A, layer.lora_B):  # type: ignore[attr-defined]
                modules = side._modules
                for name in experts.names:
                    weight = modules[name]._parameters["weight"] if name in modules else None
                    if weight is not None:
                        sources += (id(weight), weight.data_ptr(), weight._version)
        return sources


class RoutingState:
    """What the routed layers of one model share while a forward runs.

    Attributes:
        weights: The routing weights for the layers that run next; None for plain PEFT.
        base_only: Whether the layers leave out every adapter.
        given: Whether ``weights`` came from the caller, so that no router may replace them.
        record: Where the router's outputs are collected; None where nobody asked.
        stacks: The layers' stacked weights.
        shared: What a layer computed for its siblings: the input and the weights that it holds for, and the parts.
    """

    def __init__(self) -> None:
        self.weights: TokenWeights | None = None
        self.base_only = False
        self.given = False
        self.record: list[RouterOutput] | None = None
        self.stacks = Stacks()
        self.shared: tuple[Tensor, TokenWeights, dict[RoutedLayer, Tensor]] | None = None

    @contextmanager
    def scope(
        self, weights: TokenWeights | None = None, *, given: bool = False, base_only: bool = False
    ) -> Iterator[None]:
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
        stacked = state.stacks.up.get(self)
        experts = stacked[0] if stacked else self._experts()
        if not experts.names:
            return result
        if experts.places is not None:
            weights = weights.of(experts.places)
        if self.training and any(map(self._dropout_rate, experts.names)):
            return (result + self._mixture_of_dropped(x, experts, weights)).to(result.dtype)  # type: ignore[no-any-return]
        delta = self._mixture_of_chosen(x, experts, weights)
        if delta is not None:
            return (result + delta).to(result.dtype)  # type: ignore[no-any-return]
        rank_space = self._rank_space(x, experts, weights)
        return add_product(result, rank_space, stacked[1] if stacked else self._stack_up(experts))

    def enable_adapters(self: Any, enabled: bool) -> None:
        """As PEFT's, but which experts train is left alone: the end of ``disable_adapter`` must not unfreeze any."""
        self._disable_adapters = not enabled

    def _experts(self: Any) -> Experts:
        active = self.active_adapters
        names = tuple(name for name in active if name in self.lora_A)
        return Experts(
            None if len(names) == len(active) else tuple(active.index(name) for name in names),
            names,
            tuple(self.lora_A[name].weight.shape[0] for name in names),
            tuple(self.scaling[name] for name in names),
        )

    def _matrices(self: Any, experts: Experts) -> tuple[list[Tensor], list[Tensor]]:
        """The ``A`` and the ``B`` of each expert."""
        return [self.lora_A[name].weight for name in experts.names], [
            self.lora_B[name].weight for name in experts.names
        ]

    def _stack_up(self: Any, experts: Experts) -> Tensor:
        """``(out_features, sum of ranks)``."""
        up = torch.cat([self.lora_B[name].weight for name in experts.names], dim=1)
        if not torch.is_grad_enabled():
            self.routing.stacks.up[self] = experts, up
        return up

    def _siblings(self: Any, experts: Experts) -> Siblings:
        """The layers that one product down serves: this one, and those fed alike with the same experts."""
        stacks = self.routing.stacks
        siblings: Siblings | None = stacks.siblings.get(self)
        if siblings is None:
            layers = tuple(layer for layer in self.fed_alike if layer is self or layer._experts() == experts)
            down = torch.cat([layer.lora_A[name].weight for layer in layers for name in experts.names])
            siblings = Siblings(layers, down)
            if not torch.is_grad_enabled():
                stacks.siblings[self] = siblings
        return siblings

    def _rank_space(self: Any, x: Tensor, experts: Experts, weights: TokenWeights) -> Tensor:
        """``(batch, seq, sum of ranks)``: ``A x`` of each expert times its weight; for all siblings at once."""
        state = self.routing
        if state.shared is not None and state.shared[0] is x and state.shared[1] is weights:
            part: Tensor | None = state.shared[2].pop(self, None)
            if part is not None:
                return part
        siblings: Siblings = self._siblings(experts)
        rank_space = F.linear(self._cast_input_dtype(x, siblings.down.dtype), siblings.down)
        per_rank = weights.per_rank(experts.ranks, experts.scalings, rank_space.dtype)
        if len(siblings.layers) == 1:
            return rank_space * per_rank
        split = rank_space.unflatten(-1, (len(siblings.layers), -1)) * per_rank.unsqueeze(-2)
        parts: dict[RoutedLayer, Tensor] = dict(zip(siblings.layers, split.unbind(-2), strict=True))
        state.shared = x, weights, parts
        return parts.pop(self)

    def _mixture_of_chosen(self: Any, x: Tensor, experts: Experts, weights: TokenWeights) -> Tensor | None:
        """The mixture by the chosen experts alone; None where the dense product is cheaper or the only one."""
        if weights.chosen is None or torch.is_grad_enabled():
            return None
        if not pays_sparse(len(experts.names), weights.chosen.shape[-1]):
            return None
        lora_a, lora_b = self._matrices(experts)
        return sparse_delta(self._cast_input_dtype(x, lora_a[0].dtype), lora_a, lora_b, experts.scalings, weights)

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
    if torch.is_grad_enabled() or not _continues(kwargs.get("past_key_values")) or not state.stacks.still_valid():
        state.stacks.clear()
    if causal_lm.training:
        _keep_routing_in_recomputation(state, causal_lm)
    return args, kwargs


def _drop_weights(state: RoutingState, causal_lm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state.weights, state.given, state.shared = None, False, None
    if getattr(output, "past_key_values", None) is None:
        state.stacks.clear()
    else:
        state.stacks.seal()


def _continues(cache: Any) -> bool:
    """Whether a key-value cache holds a part of the sequence already."""
    return isinstance(cache, Cache) and bool(cache.get_seq_length() > 0)


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
