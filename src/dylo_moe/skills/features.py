"""Hidden states of the frozen base alone: no expert can change them, so they do not drift.

Two of them are used: the last hidden states, which show what a text is about, and those that the router reads, if it
reads frozen ones (``final``, ``prefix:K``, ``context:K``). Both are scaled as the router scales its input.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dylo_moe.core import Context, DyLoRA_MoE, evaluating, hidden_states_of, rms_normalize, running_means
from dylo_moe.errors import RoutingError
from dylo_moe.spec import RoutingMode


class BaseFeatures(NamedTuple):
    """Hidden states of the base, ``(batch, seq, hidden_size)``, each at a root mean square of 1.

    Attributes:
        last: Last hidden states.
        routed: Hidden states that the router's gate reads.
    """

    last: Tensor
    routed: Tensor


def check_frozen_features(mode: RoutingMode) -> None:
    """Raise ``RoutingError`` unless no expert can change what the router reads."""
    if not mode.reads_frozen_features:
        raise RoutingError(
            f"`routing` must be context:K, base_context:K, prefix:K or final here, got {mode}: its router reads what "
            "the experts of the layers below have changed"
        )


@torch.no_grad()
def base_features(model: DyLoRA_MoE, input_ids: Tensor, attention_mask: Tensor) -> BaseFeatures:
    """Run the base without any expert, in evaluation mode.

    Args:
        model: With a routing mode that reads frozen features.
        input_ids: ``(batch, seq)``.
        attention_mask: ``(batch, seq)``, nonzero for real tokens.

    Raises:
        RoutingError: The router does not read frozen features.
    """
    mode = model.routing_mode
    check_frozen_features(mode)
    decoder = model.experts.decoder
    entering: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        entering.append(hidden_states_of(args, kwargs))

    layer = decoder.layers[mode.layer or 0]
    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with model.base_only(), evaluating(decoder.backbone):
            last: Tensor = decoder.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    finally:
        hook.remove()
    read = last if mode.reads_base_output else entering[0]
    if mode.reads_context:
        read = running_means(read, Context(attention_mask))
    return BaseFeatures(rms_normalize(last), rms_normalize(read))
