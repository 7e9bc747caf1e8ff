"""LoRA layers that read the same tensor, such as the query, key and value projections: one product for all.

The layers are found by their names, which is only a hint: a layer that is fed another tensor, or has other experts,
computes for itself.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dylo_moe.core.lora.layer_experts import LayerExperts, LoraLinear, active_experts
from dylo_moe.core.lora.ops import sparse_down
from dylo_moe.core.lora.stacking import concat_rows
from dylo_moe.core.lora.state import ForwardCall, SharedProjection
from dylo_moe.core.lora.token_weights import TokenWeights

SHARED_INPUT_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of sibling modules that model families feed the same tensor."""


class SharedInputGroup:
    """Layers that read the same tensor, as far as their names show.

    Args:
        layers: The layers; a layer that shares its input with no other is alone in its group.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = tuple(layers)

    def project_down(
        self,
        layer: LoraLinear,
        experts: LayerExperts,
        x: Tensor,
        weights: TokenWeights,
        call: ForwardCall,
        *,
        sparse: bool,
    ) -> Tensor:
        """Return a layer's input in rank space, ``A x`` of each expert times weight and scaling.

        The first layer of the group that is called with an input projects it for all layers with the same experts;
        their parts wait in ``call``.

        Args:
            layer: Layer of this group.
            experts: Its active experts.
            x: ``(batch, seq, in_features)``.
            weights: Routing weights of its experts.
            call: The forward that runs.
            sparse: Whether to compute the top-k experts alone.

        Returns:
            ``(batch, seq, sum of ranks)``, or what ``sparse_down`` returns for one layer.
        """
        shared = call.shared_projection
        if shared is not None and shared.sparse is sparse and shared.x is x and shared.weights is weights:
            part = shared.parts.pop(layer, None)
            if part is not None:
                return part
        project = self._project_sparse if sparse else self._project_dense
        parts = project(layer, experts, x, weights, call)
        call.shared_projection = SharedProjection(sparse, x, weights, parts)
        return parts.pop(layer)

    def _project_dense(
        self, layer: LoraLinear, experts: LayerExperts, x: Tensor, weights: TokenWeights, call: ForwardCall
    ) -> dict[LoraLinear, Tensor]:
        stacks = call.stacks
        stack = None if stacks is None else stacks.down.get(layer)
        if stack is None:
            layers = self._layers_with(experts, layer)
            matrices: list[Tensor] = [other.lora_A[name].weight for other in layers for name in experts.names]
            stack = layers, concat_rows(matrices)
            if stacks is not None:
                stacks.down[layer] = stack
                stacks.watch(matrices)
        layers, down = stack
        rank_space = F.linear(layer._cast_input_dtype(x, down.dtype), down)
        per_rank = weights.per_rank(experts.ranks, experts.scalings, rank_space.dtype)
        if len(layers) == 1:
            return {layer: rank_space * per_rank}
        split = rank_space.unflatten(-1, (len(layers), -1)) * per_rank.unsqueeze(-2)
        return dict(zip(layers, split.unbind(-2), strict=True))

    def _project_sparse(
        self, layer: LoraLinear, experts: LayerExperts, x: Tensor, weights: TokenWeights, call: ForwardCall
    ) -> dict[LoraLinear, Tensor]:
        layers = self._layers_with(experts, layer)
        matrices = [other.lora_A[name].weight for name in experts.names for other in layers]
        cast = layer._cast_input_dtype(x, matrices[0].dtype)
        rank_spaces = sparse_down(cast, matrices, experts.scalings, weights, len(layers))
        return dict(zip(layers, rank_spaces.unbind(1), strict=True))

    def _layers_with(self, experts: LayerExperts, layer: LoraLinear) -> list[LoraLinear]:
        """Return the layers of the group whose active experts are those of ``layer``, and can be read directly."""
        return [
            other
            for other in self.layers
            if other is layer
            or (
                other.scaling == layer.scaling
                and other.active_adapters == layer.active_adapters
                and active_experts(other) == experts
            )
        ]
