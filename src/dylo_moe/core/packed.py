"""Rows that hold several examples: positions, and whether a model keeps the examples apart."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.core.offload import device_of
from dylo_moe.errors import RoutingError

_LEAK = 0.05
"""Share of the effect of seeing the other example that rounding may have; a leak has all of it."""


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Positions that begin anew with each segment.

    transformers tells packed examples apart by such positions, for every kind of attention, where it gets no mask.

    Args:
        segment_ids: ``(batch, seq)``; equal for tokens of one example, which are next to each other.

    Returns:
        ``(batch, seq)``.
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def check_segments(model: PreTrainedModel, segment_ids: Tensor) -> None:
    """Refuses what would let examples see each other unnoticed.

    Raises:
        RoutingError: The model's attention is FlashAttention, which tells examples apart in a batch of one row only.
    """
    if segment_ids.shape[0] > 1 and "flash" in str(model.config._attn_implementation):
        raise RoutingError(
            f"segment_ids of {segment_ids.shape[0]} rows under {model.config._attn_implementation}: it keeps examples "
            "apart within one row only; put the rows behind each other into one"
        )


@torch.no_grad()
def keeps_examples_apart(model: PreTrainedModel) -> bool:
    """Whether an example in a packed row comes out as it does alone; asked of the model itself, with random tokens.

    Models whose state runs through the row, such as recurrent ones, or that do not use the positions that they are
    given, do not.
    """
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (torch.randint(vocabulary, (1, 6), generator=generator).to(device_of(model)) for _ in range(2))
    both = torch.cat([first, second], dim=1)
    segments = torch.cat([torch.ones_like(first), torch.full_like(second, 2)], dim=1)
    try:
        alone = model(second, use_cache=False).logits
        seeing = model(both, use_cache=False).logits[:, first.shape[1] :]
        packed = model(both, position_ids=positions_in_segments(segments), use_cache=False).logits[:, first.shape[1] :]
    finally:
        model.train(training)
    return bool((packed - alone).abs().max() <= _LEAK * (seeing - alone).abs().max())
