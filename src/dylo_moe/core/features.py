"""What the frozen base alone computes for each token: no expert has a part in it, so it never drifts.

Two places matter: the last hidden states, which tell what a text is about, and those that the router reads, where it
reads frozen ones (``final``, ``prefix:K``, ``context:K``). Both are scaled as the router scales its input.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dylo_moe.core.context import Context, running_means
from dylo_moe.core.decoder import evaluating, hidden_states_of
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.core.router import normalised
from dylo_moe.core.routing import prefix_layer, reads_context
from dylo_moe.errors import RoutingError


class BaseFeatures(NamedTuple):
    """Hidden states of the base, ``(batch, seq, hidden_size)``, each at a root mean square of 1.

    Attributes:
        last: The last ones.
        routed: The ones that the router's gate reads.
    """

    last: Tensor
    routed: Tensor


def check_frozen_features(routing: str) -> None:
    """Raises ``RoutingError`` unless the router of a resolved mode reads what no expert can change."""
    if routing == "per_layer":
        raise RoutingError(
            "--routing must be context:K, prefix:K or final where skills are added one by one: under per_layer the "
            "router reads what the experts of the layers below have changed, got per_layer"
        )


@torch.no_grad()
def base_features(model: DyLoRA_MoE, input_ids: Tensor, attention_mask: Tensor) -> BaseFeatures:
    """Runs the base without any expert, in evaluation mode.

    Args:
        model: With routing ``final``, ``prefix:K`` or ``context:K``.
        input_ids: ``(batch, seq)``.
        attention_mask: ``(batch, seq)``, nonzero for real tokens.

    Raises:
        RoutingError: The router does not read frozen features.
    """
    check_frozen_features(model.routing)
    decoder = model.experts.decoder
    entering: list[Tensor] = []

    def hold(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(hidden_states_of(args, kwargs))

    layer = decoder.layers[prefix_layer(model.routing)]
    hook = layer.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        with model.base_only(), evaluating(decoder.backbone):
            last: Tensor = decoder.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    finally:
        hook.remove()
    read = last if model.routing == "final" else entering[0]
    if reads_context(model.routing):
        read = running_means(read, Context(attention_mask))
    return BaseFeatures(normalised(last), normalised(read))
