"""The mean over an example's tokens so far, which routing ``context:K`` reads.

One token says little about what a text is. The mean of all hidden states up to it says more, and still depends on
earlier tokens alone. Padding has no part in it, and of packed examples each has its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.core.caches import ContextPart, Sums
from dylo_moe.core.router import normalised
from dylo_moe.errors import RoutingError


class Context(NamedTuple):
    """What a forward says of its tokens.

    Attributes:
        mask: ``(batch, past + seq)``, nonzero for real tokens, or ``(batch, 1, seq, seq)``, which tokens each one sees;
            None where all are real.
        positions: ``(batch or 1, seq)``, 0 where an example begins; None where one example fills each row.
        before: What went before; None where nothing did.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    before: ContextPart | None = None


def running_sums(hidden_states: Tensor, context: Context) -> Sums:
    """Add up the normalised hidden states of each example's tokens up to each of them.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``.
        context: Of this forward.

    Returns:
        Sums in float32 at least.

    Raises:
        RoutingError: The mask tells each token apart, and tokens went before.
    """
    features = normalised(hidden_states)
    if context.mask is not None and context.mask.ndim == 4:
        return _sums_by_mask(features, context)
    real = torch.ones_like(features[..., :1])
    if context.mask is not None:
        real = context.mask[:, -features.shape[1] :, None].to(real)
    sums = Sums(features * real, real)
    begun = None
    if context.positions is None:
        sums = Sums(*(part.cumsum(dim=1) for part in sums))
    else:
        sums, begun = _restarted(sums, context.positions)
    return sums if context.before is None else context.before.extended(sums, begun)


def means(sums: Sums) -> Tensor:
    """Return ``(batch, seq, hidden_size)``: each sum over its count; 0 where there was nothing but padding."""
    return sums.features / sums.counts.clamp(min=1)


def running_means(hidden_states: Tensor, context: Context) -> Tensor:
    """Return the means of ``running_sums``, ``(batch, seq, hidden_size)``."""
    return means(running_sums(hidden_states, context))


def real_tokens(mask: Tensor) -> Tensor:
    """Return ``(batch, seq)``, nonzero for real tokens, of an attention mask of either shape.

    Args:
        mask: ``(batch, seq)``, or ``(batch, 1, seq, keys)`` of bool or of what is added to attention scores; a token
            that does not see itself is padding.
    """
    if mask.ndim == 2:
        return mask
    seen = _seen(mask)
    return seen.diagonal(offset=seen.shape[-1] - seen.shape[-2], dim1=-2, dim2=-1)


def _seen(mask: Tensor) -> Tensor:
    """Return ``(batch, seq, keys)`` of bool from a mask of bool or of what is added to attention scores."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def _sums_by_mask(features: Tensor, context: Context) -> Sums:
    """Add up what each token sees, as uniform attention does."""
    assert context.mask is not None
    seen = _seen(context.mask)
    if context.before is not None or seen.shape[-1] != features.shape[1]:
        raise RoutingError(
            "routing 'context' needs an attention_mask of shape (batch, past + seq) where a cache holds earlier "
            f"tokens, got {tuple(context.mask.shape)}"
        )
    seen = seen.to(features.dtype)
    return Sums(seen @ features, seen.sum(dim=-1, keepdim=True))


def _restarted(added: Sums, positions: Tensor) -> tuple[Sums, Tensor]:
    """Add up within each example of a row, in steps of 1, 2, 4, ... tokens; and tell which tokens' example began here.

    A sum over the whole row less what came before the example would lose the example's digits in a long row.
    """
    length = added.features.shape[1]
    places = torch.arange(length, device=positions.device)
    start = torch.where(positions[:, -length:] == 0, places, -1).cummax(dim=1).values
    begun = (start >= 0)[..., None].expand(len(added.features), -1, -1)
    behind = (places - start.clamp(min=0))[..., None]
    step = 1
    while step < length:
        within = (behind >= step)[:, step:]
        added = Sums(*(_shifted_in(part, within, step) for part in added))
        step *= 2
    return added, begun


def _shifted_in(total: Tensor, within: Tensor, step: int) -> Tensor:
    return torch.cat([total[:, :step], total[:, step:] + total[:, :-step] * within], dim=1)
