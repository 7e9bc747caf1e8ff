"""The routed LoRA layer on unmodified PEFT: ``model(input_ids, routing_weights=w)``.

``enable_routing`` gives the LoRA layers of a PEFT model a forward that mixes the active adapters by per-token
weights. Parameters, names, files and every other PEFT method stay what they were, quantised base layers included.
Where no weights are given, PEFT's own forward runs.

Not covered: LoRA variants that do not add ``B A x`` (DoRA and others), LoRA on embeddings and convolutions.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from dylo_moe.core.decoder import is_wrapped
from dylo_moe.core.extension import Extension, extend, restore
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
from dylo_moe.core.routed_forward import RoutedCausalLM, RoutedCheckpoint
from dylo_moe.core.routing_state import Experts, KeptStacks, RoutingState, Shared, Stack
from dylo_moe.errors import RoutingError

_LINEAR = (
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "QuantLinear",
    "TorchaoLoraLinear",
)
"""PEFT's layers that add ``B A x`` to what a linear layer gives, by their names: each but the first needs a library of
its own, and one that PEFT adds later is refused until it was looked at."""

# Layers that models feed the very same tensor. Only a hint: where it does not hold, each layer computes for itself.
_FED_ALIKE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class RoutedLayer(Extension):
    """What a PEFT LoRA layer gains.

    Attributes:
        routing: What the routed layers of the model share.
        fed_alike: The layers that are fed the same tensor, as far as names tell; this one too.
    """

    overrides = ("forward", "enable_adapters")
    routing: RoutingState
    fed_alike: "tuple[RoutedLayer, ...]"

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the routed mixture of the active adapters that this layer has."""
        call = self.routing.call
        if call is None or (call.weights is None and not call.base_only):
            return self.extended_from.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.merged:
            raise RoutingError(
                f"the adapters {self.merged_adapters} are merged into the base; call unmerge_adapter() first to route"
            )
        if kwargs.pop("adapter_names", None) is not None and not call.base_only:
            raise RoutingError("adapter_names and routing_weights both say which adapter a row takes; give one of them")
        if call.base_only:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.disable_adapters:
            return self.extended_from.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        weights = call.weights if call.weights.weights.device == x.device else call.weights.on(x.device)
        if x.dim() == 2:  # some modules flatten their tokens
            row, weights = call.as_one_row(x), weights.in_one_row(len(x))
            _check_weights(weights.weights, row, self.active_adapters)
            return self._add_mixture(result.unsqueeze(0), row, weights).squeeze(0)  # type: ignore[no-any-return]
        _check_weights(weights.weights, x, self.active_adapters)
        return self._add_mixture(result, x, weights)  # type: ignore[no-any-return]

    def _add_mixture(self: Any, result: Tensor, x: Tensor, weights: TokenWeights) -> Tensor:
        """The base layer's result plus the mixture, by the product that is the cheapest for these shapes."""
        no_grad = not torch.is_grad_enabled()
        # the output of a plain linear layer is nobody else's, unless a hook was there to keep it
        own = type(self.base_layer) is nn.Linear and not is_wrapped(self.base_layer)
        sparse = no_grad and weights.chosen is not None and not self.training
        one_token = weights.of_one_token() if sparse else None
        if one_token is not None and (updates := self._updates_of(one_token)) is not None:
            for down, up, scale in updates:
                x = self._cast_input_dtype(x, down.dtype)
                result = add_of_one_token(result, x, down, up, scale=scale, in_place=own)
            return result
        kept = self._kept()
        stack = kept and kept.stacks.get(self)
        experts = stack.experts if stack else self._experts()
        if not experts.names:
            return result
        if not experts.plain:
            return self._add_by_modules(result, x, weights)  # type: ignore[no-any-return]
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
        """Do as PEFT does; but where it would train all active adapters again, those train that did before."""
        if not enabled and not self.disable_adapters:
            self.trained_before = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.extended_from.enable_adapters(self, enabled)
        if enabled and (trained := vars(self).pop("trained_before", None)) is not None:
            self.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    def _experts(self: Any) -> Experts:
        active, matrices, scalings = self.active_adapters, self.lora_A, self.scaling
        names = tuple([name for name in active if name in matrices])
        return Experts(
            None if len(names) == len(active) else tuple([active.index(name) for name in names]),
            names,
            tuple([len(matrices[name].weight) for name in names]),
            tuple([scalings[name] for name in names]),
            self._are_plain(names),
        )

    def _are_plain(self: Any, names: Iterable[str]) -> bool:
        """Tell whether the matrices of these experts are where their modules say, and the modules only multiply."""
        lora_a, lora_b = self.lora_A, self.lora_B
        return not any(is_wrapped(lora_a[name]) or is_wrapped(lora_b[name]) for name in names if name in lora_a)

    def _add_by_modules(self: Any, result: Tensor, x: Tensor, weights: TokenWeights) -> Tensor:
        """Return the result with one expert after the other, by the modules that hold their matrices.

        They are called, as PEFT does, where something hangs on that: offloading puts the matrices there only then.
        """
        for place, name in enumerate(self.active_adapters):
            if name in self.lora_A:
                dropped = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
                delta = self.lora_B[name](self.lora_A[name](dropped))
                scale = (weights.weights[..., place, None] * self.scaling[name]).to(delta.dtype)
                result = result + (delta * scale).to(result.dtype)
        return result

    def _matrices(self: Any, experts: Experts) -> tuple[list[Tensor], list[Tensor]]:
        """The ``A`` and the ``B`` of each expert."""
        lora_a, lora_b, names = self.lora_A, self.lora_B, experts.names
        return [lora_a[name].weight for name in names], [lora_b[name].weight for name in names]

    def _kept(self: Any) -> KeptStacks | None:
        """Where stacks are kept; None where they are not, or where a gradient has to reach the weights."""
        call = self.routing.call
        return None if call is None or torch.is_grad_enabled() else call.kept

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
        if self.scaling != other.scaling or self.active_adapters != other.active_adapters:
            return False
        mine, theirs = self._experts(), other._experts()
        return bool(mine == theirs and theirs.plain)

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
        call = self.routing.call
        shared = call.shared
        if shared is not None and shared.product == product and shared.x is x and shared.weights is weights:
            part: Tensor | None = shared.parts.pop(self, None)
            if part is not None:
                return part
        parts = of_all()
        call.shared = Shared(product, x, weights, parts)
        return parts.pop(self)

    def _updates_of(self: Any, chosen: list[tuple[int, float]]) -> list[tuple[Tensor, Tensor, float]] | None:
        """The matrices and the scale of each chosen expert; None where they are not where their modules say."""
        active, lora_a, lora_b, scaling = self.active_adapters, self.lora_A, self.lora_B, self.scaling
        updates = []
        for place, weight in chosen:
            name = active[place]
            if name in scaling:
                down, up = lora_a[name], lora_b[name]
                if is_wrapped(down) or is_wrapped(up):
                    return None
                updates.append((down.weight, up.weight, weight * scaling[name]))
        return updates

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


class RoutedTuner(Extension):
    """What PEFT's own model gains: unloading the adapters takes all of routing off the base model."""

    overrides = ("unload", "merge_and_unload")
    routing: RoutingState

    def unload(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """Do as PEFT does, and leave a plain base model."""
        return _plain_again(self, self.extended_from.unload(self, *args, **kwargs))

    def merge_and_unload(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """Do as PEFT does, and leave a plain base model."""
        return _plain_again(self, self.extended_from.merge_and_unload(self, *args, **kwargs))


def enable_routing(model: PeftModel) -> RoutingState:
    """Make ``routing_weights`` an argument of a PEFT model with LoRA adapters.

    ``model(input_ids, routing_weights=w)`` then mixes the active adapters by ``w``, of shape
    ``(batch, seq, num_active_adapters)`` in the order of ``model.active_adapters``, with gradients to ``w``.
    One-hot weights equal that adapter alone, all-zero weights equal the base. Without the argument the model is
    PEFT as before. May be called again after adapters were added: only layers that are new are changed.
    ``model.unload()`` and ``model.merge_and_unload()`` take it all off.

    Returns:
        The state that the routed layers share.

    Raises:
        RoutingError: It is no PEFT model, has no LoRA layer, or one that cannot be routed; nothing is changed then.
    """
    if not isinstance(model, PeftModel):
        raise RoutingError(
            f"enable_routing needs a peft.PeftModel, got a {type(model).__name__}; make one with peft.get_peft_model, "
            "or a mixture with DyLoRA_MoE"
        )
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner) or not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise RoutingError(f"routing needs a model with LoRA adapters, and {type(model).__name__} has none")
    return _route_layers(tuner)


def _route_layers(tuner: Any) -> RoutingState:
    causal_lm = tuner.model
    layers = [(name, module) for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        _check_layer(name, layer)
    state: RoutingState = vars(causal_lm).get("routing") or RoutingState()
    state.take_up = partial(_take_up, tuner)
    state.adapters = tuple(tuner.peft_config)
    for thing, extension in (
        (causal_lm, RoutedCausalLM),
        (tuner, RoutedTuner),
        *((layer, RoutedLayer) for _, layer in layers),
    ):
        if not isinstance(thing, extension):
            thing.routing = state
            extend(thing, extension)
    _find_layers_fed_alike(causal_lm, [layer for _, layer in layers])
    return state


def _take_up(tuner: Any) -> None:
    """Route the layers of adapters that were added since."""
    if tuple(tuner.peft_config) != tuner.routing.adapters:
        _route_layers(tuner)


def _plain_again(tuner: Any, unloaded: nn.Module) -> nn.Module:
    state, causal_lm = tuner.routing, tuner.model
    if state.hooks is not None:
        state.hooks.remove()
    for module in causal_lm.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, RoutedCheckpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint
    for thing, extension in ((causal_lm, RoutedCausalLM), (tuner, RoutedTuner)):
        restore(thing, extension)
        vars(thing).pop("routing", None)
    return unloaded


def _find_layers_fed_alike(causal_lm: nn.Module, layers: Sequence[Any]) -> None:
    for layer in layers:
        layer.fed_alike = (layer,)
    for module in causal_lm.modules():
        children = dict(module.named_children())
        for names in _FED_ALIKE:
            found: list[Any] = [children[name] for name in names if isinstance(children.get(name), RoutedLayer)]
            for layer in found:
                layer.fed_alike = tuple(found)


def _check_layer(name: str, layer: LoraLayer) -> None:
    if layer.lora_variant:
        adapter, variant = next(iter(layer.lora_variant.items()))
        raise RoutingError(
            f"adapter {adapter!r} uses {type(variant).__name__} at {name}; only plain LoRA and rsLoRA can be routed"
        )
    if any(layer.lora_bias.values()):
        raise RoutingError(f"lora_bias is set at {name}; train the adapter with lora_bias=False to route it")
    if not isinstance(layer, RoutedLayer) and "forward" in vars(layer):
        raise RoutingError(
            f"the forward of {name} was replaced, by another way to mix adapters (X-LoRA) or by offloading; enable "
            "routing on a plain LoRA model, before it is offloaded"
        )
    own = layer.extended_from if isinstance(layer, RoutedLayer) else type(layer)
    if own.__name__ not in _LINEAR or not own.__module__.startswith("peft.tuners.lora."):
        raise RoutingError(
            f"{name} is adapted by {own.__module__}.{own.__name__}; only LoRA on linear layers can be routed, leave it "
            "out"
        )


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
