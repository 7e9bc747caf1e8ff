"""The mean over an example's tokens so far, which routing ``context:K`` reads, and caches that carry it on.

One token says little about what a text is. The mean of all hidden states up to it says more, and still depends on
earlier tokens alone. Padding has no part in it, and of packed examples each has its own.
"""

from typing import Any, NamedTuple

import torch
from torch import LongTensor, Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from dylo_moe.core.router import normalised
from dylo_moe.errors import RoutingError


class Sums(NamedTuple):
    """What was added up by each token of the newest forward.

    Attributes:
        features: ``(batch, seq, hidden_size)``, the sum of all normalised hidden states up to each token.
        counts: ``(batch, seq, 1)``, of how many tokens.
    """

    features: Tensor
    counts: Tensor


class Context(NamedTuple):
    """What a forward says of its tokens.

    Attributes:
        mask: ``(batch, past + seq)``, nonzero for real tokens; None where all are.
        positions: ``(batch or 1, seq)``, 0 where an example begins; None where one example fills each row.
        cache: What went before; None without a cache.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    cache: "ContextCache | None" = None


def running_means(hidden_states: Tensor, context: Context) -> Tensor:
    """Means of the normalised hidden states of each example's tokens up to each of them.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``.
        context: Of this forward; its cache takes in what was added up.

    Returns:
        ``(batch, seq, hidden_size)``, float32 at least; 0 where there was nothing but padding.
    """
    length = hidden_states.shape[1]
    features = normalised(hidden_states)
    real = torch.ones_like(features[..., :1])
    if context.mask is not None:
        real = context.mask[:, -length:, None].to(features.dtype)
    features = features * real
    sums = Sums(features.cumsum(dim=1), real.cumsum(dim=1))
    begun = None
    if context.positions is not None:
        sums, begun = _since_the_beginning(sums, Sums(features, real), context.positions)
    if context.cache is not None:
        sums = context.cache.going_on(sums, begun)
    return sums.features / sums.counts.clamp(min=1)


def _since_the_beginning(sums: Sums, added: Sums, positions: Tensor) -> tuple[Sums, Tensor]:
    """Leaves out what came before the newest example of a row began; and whether one began in this forward."""
    length = added.features.shape[1]
    places = torch.arange(length, device=positions.device)
    start = torch.where(positions[:, -length:] == 0, places, -1).cummax(dim=1).values
    start = start.expand(len(added.features), -1)[..., None]
    begun = start >= 0
    at = start.clamp(min=0)
    before = [
        (total - own).gather(1, at.expand(-1, -1, total.shape[-1])) * begun
        for total, own in zip(sums, added, strict=True)
    ]
    return Sums(*(total - early for total, early in zip(sums, before, strict=True))), begun


class ContextCache(DynamicCache):
    """A key-value cache that also carries the sums over the tokens so far."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.sums: Sums | None = None

    def going_on(self, sums: Sums, begun: Tensor | None) -> Sums:
        """Adds what was there before to the sums of a forward, except for examples that began in it."""
        if self.sums is not None:
            newest = Sums(*(total[:, -1:] for total in self.sums))
            kept = 1.0 if begun is None else (~begun).to(sums.features.dtype)
            sums = Sums(*(total + old * kept for total, old in zip(sums, newest, strict=True)))
        self.sums = sums
        return sums

    @override
    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda total: total.index_select(0, beam_idx.to(total.device)))

    @override
    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = self.get_seq_length()
        super().crop(*args, **kwargs)
        taken = before - self.get_seq_length()
        if taken and self.sums is not None:
            if taken >= self.sums.counts.shape[1]:
                raise RoutingError(
                    f"routing 'context' can take back the tokens of the newest forward but its first, "
                    f"{self.sums.counts.shape[1] - 1}, and {taken} were asked for"
                )
            self._each(lambda total: total[:, :-taken])

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda total: total.repeat_interleave(repeats, dim=0))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda total: total[indices])

    @override
    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.sums = None

    def _each(self, change: Any) -> None:
        if self.sums is not None:
            self.sums = Sums(*map(change, self.sums))


def context_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> Context:
    """What a forward of a backbone says of its tokens, from the arguments that it is called with.

    Raises:
        RoutingError: The mask or the cache is of a kind that does not tell.
    """
    mask, given = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise RoutingError("routing 'context' needs an attention_mask of shape (batch, seq), got another one")
    if given is not None and not isinstance(given, ContextCache):
        if not isinstance(given, DynamicCache) or given.get_seq_length() > 0:
            raise RoutingError(
                f"routing 'context' needs a cache that carries the context: got a {type(given).__name__} that does "
                "not; pass no past_key_values, or the one that an earlier forward of this model returned"
            )
        given = None
        wanted = True
    else:
        use_cache = kwargs.get("use_cache")
        wanted = use_cache if use_cache is not None else model.config.use_cache and not model.training
    cache = given if given is not None else ContextCache(model.config) if wanted else None
    return Context(mask, kwargs.get("position_ids"), cache)
