"""The mean over an example's tokens so far, which routing ``context:K`` reads.

One token says little about the kind of a text. The mean of all hidden states up to it says more, and still depends on
earlier tokens alone. Padding is left out, and packed examples do not mix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.core.routing.caches import ContextPart, RunningSums
from dylo_moe.core.routing.router import rms_normalize
from dylo_moe.errors import RoutingError


class Context(NamedTuple):
    """Mask, positions and earlier sums of the tokens of a forward.

    Attributes:
        mask: ``(batch, past + seq)``, nonzero for real tokens, or ``(batch, 1, seq, seq)``, the tokens that each one
            sees; None where all are real.
        positions: ``(batch or 1, seq)``, 0 where an example begins; None where one example fills each row.
        before: Sums over the tokens before this forward; None where there are none.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    before: ContextPart | None = None


def running_sums(hidden_states: Tensor, context: Context) -> RunningSums:
    """Sum the normalized hidden states of each example's tokens up to each of them.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``.
        context: Context of this forward.

    Returns:
        Sums in float32 at least.

    Raises:
        RoutingError: The mask has a row for each token, although a cache holds earlier tokens.
    """
    features = rms_normalize(hidden_states)
    if context.mask is not None and context.mask.ndim == 4:
        return _sums_by_mask(features, context)
    real = torch.ones_like(features[..., :1])
    if context.mask is not None:
        real = context.mask[:, -features.shape[1] :, None].to(real)
    sums = RunningSums(features * real, real)
    started = None
    if context.positions is None:
        sums = RunningSums(*(part.cumsum(dim=1) for part in sums))
    else:
        sums, started = _sums_by_example(sums, context.positions)
    return sums if context.before is None else context.before.extend(sums, started)


def means(sums: RunningSums) -> Tensor:
    """Return each sum over its count, ``(batch, seq, hidden_size)``; 0 where there was only padding."""
    return sums.features / sums.counts.clamp(min=1)


def running_means(hidden_states: Tensor, context: Context) -> Tensor:
    """Return the means of ``running_sums``, ``(batch, seq, hidden_size)``."""
    return means(running_sums(hidden_states, context))


def real_tokens(mask: Tensor) -> Tensor:
    """Return ``(batch, seq)``, nonzero for real tokens, from an attention mask of either shape.

    Args:
        mask: ``(batch, seq)``, or ``(batch, 1, seq, keys)`` as bool or as a bias on attention scores. A token that does
            not see itself is padding.
    """
    if mask.ndim == 2:
        return mask
    seen = _seen(mask)
    return seen.diagonal(offset=seen.shape[-1] - seen.shape[-2], dim1=-2, dim2=-1)


def _seen(mask: Tensor) -> Tensor:
    """Return ``(batch, seq, keys)`` of bool from a mask of bool or a bias on attention scores."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def _sums_by_mask(features: Tensor, context: Context) -> RunningSums:
    """Sum over the tokens that each token sees, as uniform attention does."""
    assert context.mask is not None
    seen = _seen(context.mask)
    if context.before is not None or seen.shape[-1] != features.shape[1]:
        raise RoutingError(
            "`routing` 'context' needs an attention_mask of shape (batch, past + seq) where a cache holds earlier "
            f"tokens, got {tuple(context.mask.shape)}"
        )
    seen = seen.to(features.dtype)
    return RunningSums(seen @ features, seen.sum(dim=-1, keepdim=True))


def _sums_by_example(values: RunningSums, positions: Tensor) -> tuple[RunningSums, Tensor]:
    """Sum within each example of a packed row, in steps of 1, 2, 4, ... tokens.

    Subtracting the sums before each example from those of the whole row would lose digits in a long row.

    Args:
        values: Values of each token.
        positions: ``(batch or 1, seq)``, 0 where an example begins.

    Returns:
        The sums, and ``(batch, seq, 1)``, true for the tokens whose example begins in this forward.
    """
    length = values.features.shape[1]
    places = torch.arange(length, device=positions.device)
    start = torch.where(positions[:, -length:] == 0, places, -1).cummax(dim=1).values
    started = (start >= 0)[..., None].expand(len(values.features), -1, -1)
    num_before = (places - start.clamp(min=0))[..., None]
    step = 1
    while step < length:
        same_example = (num_before >= step)[:, step:]
        # each token's value and that of the token ``step`` places before, where both are of one example
        shifted = (part[:, step:] + part[:, :-step] * same_example for part in values)
        values = RunningSums(
            *(torch.cat([part[:, :step], new], dim=1) for part, new in zip(values, shifted, strict=True))
        )
        step *= 2
    return values, started
