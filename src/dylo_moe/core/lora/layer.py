"""The forward of a routed LoRA layer: the base layer's output plus the mixture of the active adapters.

A layer of PEFT stays an object of PEFT. ``RoutedLayer`` only gives it a forward that calls its ``LayerMixer``; which
product computes the mixture is decided here, and ``ops`` has the products.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dylo_moe.core.base import is_wrapped
from dylo_moe.core.lora.extension import Extension
from dylo_moe.core.lora.layer_experts import LayerExperts, LoraLinear, active_experts
from dylo_moe.core.lora.ops import (
    add_lora_single_token,
    addmm_lora,
    dense_lora_delta,
    has_sparse_kernel,
    prefer_sparse,
    sparse_up,
)
from dylo_moe.core.lora.shared_input import SharedInputGroup
from dylo_moe.core.lora.stacking import UpStack
from dylo_moe.core.lora.state import ForwardCall, RoutingState
from dylo_moe.core.lora.token_weights import TokenWeights
from dylo_moe.errors import RoutingError


class LayerMixer:
    """Mixes the active adapters of one LoRA layer by routing weights.

    Args:
        layer: PEFT's layer, which holds the parameters.
        state: State that the routed layers of the model share.

    Attributes:
        group: The layers that read the same tensor as this one.
        trained: Parameters that trained before the adapters were disabled; None while they are enabled.
    """

    def __init__(self, layer: LoraLinear, state: RoutingState) -> None:
        self.layer = layer
        self.state = state
        self.group = SharedInputGroup([layer])
        self.trained: list[nn.Parameter] | None = None

    def forward(self, call: ForwardCall, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output of the layer in a forward that routes or leaves out the adapters.

        Args:
            call: The forward that runs.
            x: ``(batch, seq, in_features)``, or ``(tokens, in_features)`` from modules that flatten their tokens.
            args: Further arguments of the base layer.
            kwargs: Further arguments of the base layer.
        """
        layer = self.layer
        if layer.merged:
            raise RoutingError(
                f"the adapters {layer.merged_adapters} are merged into the base; call unmerge_adapter() first to route"
            )
        if kwargs.pop("adapter_names", None) is not None and not call.base_only:
            raise RoutingError("`adapter_names` and `routing_weights` both choose the adapter of a row; give one")
        base_layer = layer.base_layer
        result: Tensor = base_layer(x, *args, **kwargs)
        if call.base_only or layer.disable_adapters:
            return result
        # safe: nothing else holds the output of nn.Linear unless a hook could keep it
        in_place = type(base_layer) is nn.Linear and not is_wrapped(base_layer)
        weights = call.weights
        assert weights is not None
        if weights.weights.device != x.device:
            weights = weights.to(x.device)
        if x.dim() == 2:
            x, weights = call.as_one_row(x), weights.as_one_row(len(x))
            _check_weights(weights.weights, x, layer.active_adapters)
            return self._add_mixture(call, result.unsqueeze(0), x, weights, in_place).squeeze(0)
        _check_weights(weights.weights, x, layer.active_adapters)
        return self._add_mixture(call, result, x, weights, in_place)

    def _add_mixture(
        self, call: ForwardCall, result: Tensor, x: Tensor, weights: TokenWeights, in_place: bool
    ) -> Tensor:
        """Add the mixture to the base layer's output, by the product that is cheapest for these shapes."""
        layer, ids = self.layer, weights.topk_expert_ids
        sparse = ids is not None and not layer.training and not torch.is_grad_enabled()
        topk = weights.single_token_topk() if sparse else None
        if topk is not None and (updates := self._single_token_updates(topk)) is not None:
            for down, up, scale in updates:
                x = layer._cast_input_dtype(x, down.dtype)
                result = add_lora_single_token(result, x, down, up, scale=scale, in_place=in_place)
            return result
        stacks = call.stacks
        stack = None if stacks is None else stacks.up.get(layer)
        experts = active_experts(layer) if stack is None else stack.experts
        if not experts.names:
            return result
        if not experts.readable:
            return self._add_by_modules(result, x, weights)
        if experts.columns is not None:
            weights = weights.select_experts(experts.columns)
        elif sparse and ids is not None and prefer_sparse(len(experts.names), ids.shape[-1]):
            lora_a, lora_b = self._matrices(experts)
            if has_sparse_kernel(lora_a, lora_b, weights):
                rank_space = self.group.project_down(layer, experts, x, weights, call, sparse=True)
                delta = sparse_up(rank_space, lora_b, weights).view(*x.shape[:-1], -1)
                return (result + delta).to(result.dtype)
        if layer.training and any(self._dropout_rate(name) for name in experts.names):
            return (result + self._mixture_with_dropout(x, experts, weights)).to(result.dtype)
        rank_space = self.group.project_down(layer, experts, x, weights, call, sparse=False)
        return addmm_lora(result, rank_space, self._up_stack(call, experts), in_place=in_place)

    def _single_token_updates(self, topk: list[tuple[int, float]]) -> list[tuple[Tensor, Tensor, float]] | None:
        """Return ``A``, ``B`` and scale of each top-k expert; None where their matrices cannot be read directly."""
        layer = self.layer
        active, lora_a, lora_b, scaling = layer.active_adapters, layer.lora_A, layer.lora_B, layer.scaling
        updates = []
        for column, weight in topk:
            name = active[column]
            if name in scaling:
                down, up = lora_a[name], lora_b[name]
                if is_wrapped(down) or is_wrapped(up):
                    return None
                updates.append((down.weight, up.weight, weight * scaling[name]))
        return updates

    def _add_by_modules(self, result: Tensor, x: Tensor, weights: TokenWeights) -> Tensor:
        """Add one expert after the other by calling the modules of its matrices, as PEFT does."""
        layer = self.layer
        for column, name in enumerate(layer.active_adapters):
            if name in layer.lora_A:
                dropped = layer.lora_dropout[name](layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype))
                delta = layer.lora_B[name](layer.lora_A[name](dropped))
                scale = (weights.weights[..., column, None] * layer.scaling[name]).to(delta.dtype)
                result = result + (delta * scale).to(result.dtype)
        return result

    def _mixture_with_dropout(self, x: Tensor, experts: LayerExperts, weights: TokenWeights) -> Tensor:
        """Return the mixture under dropout: one product for each distinct rate, as a rule a single one."""
        layer = self.layer
        by_rate: dict[float, list[int]] = {}
        for index, name in enumerate(experts.names):
            by_rate.setdefault(self._dropout_rate(name), []).append(index)
        lora_a, lora_b = self._matrices(experts)
        x = layer._cast_input_dtype(x, lora_a[0].dtype)
        parts = [
            dense_lora_delta(
                x,
                [lora_a[index] for index in indices],
                [lora_b[index] for index in indices],
                [experts.scalings[index] for index in indices],
                weights.weights[..., indices],
                layer.lora_dropout[experts.names[indices[0]]],
            )
            for indices in by_rate.values()
        ]
        return functools.reduce(torch.add, parts)

    def _dropout_rate(self, name: str) -> float:
        return getattr(self.layer.lora_dropout[name], "p", 0.0)

    def _matrices(self, experts: LayerExperts) -> tuple[list[Tensor], list[Tensor]]:
        """Return the ``A`` and the ``B`` of each expert."""
        lora_a, lora_b, names = self.layer.lora_A, self.layer.lora_B, experts.names
        return [lora_a[name].weight for name in names], [lora_b[name].weight for name in names]

    def _up_stack(self, call: ForwardCall, experts: LayerExperts) -> Tensor:
        """Return the ``B`` of the experts, concatenated to ``(out_features, sum of ranks)``."""
        stacks = call.stacks
        stack = None if stacks is None else stacks.up.get(self.layer)
        if stack is None:
            matrices: list[Tensor] = [self.layer.lora_B[name].weight for name in experts.names]
            stack = UpStack(experts, torch.cat(matrices, dim=1))
            if stacks is not None:
                stacks.up[self.layer] = stack
                stacks.watch(matrices)
        return stack.weight


class RoutedLayer(Extension):
    """Methods that a LoRA layer of PEFT gains.

    Attributes:
        mixer: Mixer that computes the layer's forward while the model routes.
    """

    overrides = ("forward", "enable_adapters")
    mixer: LayerMixer

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the base layer's output plus the mixture of the active adapters; PEFT's own output without routing."""
        mixer = self.mixer
        call = mixer.state.call
        if call is None or (call.weights is None and not call.base_only):
            output: Tensor = self.extended_from.forward(self, x, *args, **kwargs)
            return output
        return mixer.forward(call, x, args, kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """Do as PEFT does, but let enabling train what trained before instead of every active adapter."""
        mixer = self.mixer
        if not enabled and not mixer.layer.disable_adapters:
            mixer.trained = [parameter for parameter in mixer.layer.parameters() if parameter.requires_grad]
        self.extended_from.enable_adapters(self, enabled)
        if enabled and mixer.trained is not None:
            mixer.layer.requires_grad_(False)
            for parameter in mixer.trained:
                parameter.requires_grad_(True)
            mixer.trained = None


def _check_weights(weights: Tensor, x: Tensor, active: Sequence[str]) -> None:
    """Raise ``RoutingError`` unless routing weights fit the hidden states and the active adapters."""
    if weights.shape[-1] != len(active):
        raise RoutingError(
            f"`routing_weights` have {weights.shape[-1]} columns, but {len(active)} adapters are active: "
            + ", ".join(active)
        )
    if weights.shape[:-1] == x.shape[:-1]:
        return
    if any(given not in (1, wanted) for given, wanted in zip(weights.shape[:-1], x.shape[:-1], strict=False)):
        raise RoutingError(
            f"`routing_weights` are {tuple(weights.shape)}, but the hidden states are {tuple(x.shape)}; "
            "the first two dimensions must be batch and seq of the same forward"
        )
