"""Packed rows, which hold several examples: their positions, and whether a model supports them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.core.base.offload import device_of
from dylo_moe.errors import RoutingError

_MAX_ROUNDING = 0.05
"""Largest effect that rounding may have, as a share of the effect of seeing the other example."""


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Return positions that restart at 0 with each segment, ``(batch, seq)``.

    Without a mask, transformers separates packed examples by such positions, for every kind of attention.

    Args:
        segment_ids: ``(batch, seq)``; equal for tokens of one example, which are next to each other.
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def check_segments(model: PreTrainedModel, segment_ids: Tensor) -> None:
    """Check that the model's attention separates packed examples.

    Raises:
        RoutingError: The model's attention is FlashAttention, which separates examples in a batch of one row only.
    """
    if segment_ids.shape[0] > 1 and "flash" in str(model.config._attn_implementation):
        raise RoutingError(
            f"`segment_ids` have {segment_ids.shape[0]} rows, and {model.config._attn_implementation} separates "
            "examples within one row only; concatenate the rows"
        )


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
    """Return whether an example in a packed row gives the same logits as alone, by running the model on random tokens.

    Models with a state that runs through the row, such as recurrent ones, or that ignore the positions they are given
    do not support packing.
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
    return bool((packed - alone).abs().max() <= _MAX_ROUNDING * (seeing - alone).abs().max())
