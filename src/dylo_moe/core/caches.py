"""Any key-value cache of transformers, carrying along what the router needs of earlier tokens.

Under routing ``final`` that is the base pass's own cache, under ``context:K`` the sums over the tokens so far. The
cache object stays the caller's and of its class (dynamic, static, sliding, ...); what reorders it, crops it
or drops rows of it does the same to its router part.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from dylo_moe.core.extension import Extension, extend
from dylo_moe.errors import RoutingError

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What a cache is called in the arguments and outputs of this version of transformers."""

_KEPT_TOKENS = 256
"""Tokens that ``context`` can take back, less one; assisted decoding takes back some tens at a time."""


class Sums(NamedTuple):
    """What was added up by each token of a forward.

    Attributes:
        features: ``(batch, seq, hidden_size)``, the sum of all normalised hidden states up to each token.
        counts: ``(batch, seq, 1)``, of how many tokens.
    """

    features: Tensor
    counts: Tensor


class RouterPart(Protocol):
    """What a cache carries along for the router."""

    @abstractmethod
    def length(self) -> int:
        """Return how many tokens it knows."""

    @abstractmethod
    def follow(self, method: str, taken: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do what a method of the cache did; ``taken`` tells how many tokens are gone."""


class BasePass(RouterPart):
    """The base pass's own cache, for routing ``final``."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    @override
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @override
    def follow(self, method: str, taken: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        getattr(self.cache, method)(*args, **kwargs)


class ContextPart(RouterPart):
    """The sums over the tokens so far, for routing ``context:K``; those of the newest tokens can be taken back."""

    def __init__(self) -> None:
        self._newest: list[Sums] = []
        """The sums of the newest forwards, each of its own length."""
        self._length = 0

    @override
    def length(self) -> int:
        return self._length

    def extended(self, sums: Sums, begun: Tensor | None) -> Sums:
        """Add what was there before to the sums of a forward.

        Args:
            sums: Of the forward's tokens alone.
            begun: ``(batch, seq, 1)``, true for tokens whose example began in this forward; None where none did.
        """
        if not self._newest:
            return sums
        kept = 1.0 if begun is None else (~begun).to(sums.features.dtype)
        before = (total[:, -1:].to(new.device) for total, new in zip(self._newest[-1], sums, strict=True))
        return Sums(*(new + old * kept for new, old in zip(sums, before, strict=True)))

    def append(self, sums: Sums) -> None:
        """Take in the sums of a forward, as ``extended`` gave them."""
        self._length += sums.counts.shape[1]
        if sums.counts.shape[1] > _KEPT_TOKENS:
            # copied, so that the rest can be freed
            sums = Sums(*(total[:, -_KEPT_TOKENS:].clone() for total in sums))
        self._newest.append(sums)
        while sum(map(_tokens, self._newest[1:])) >= _KEPT_TOKENS:
            self._newest.pop(0)

    @override
    def follow(self, method: str, taken: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._newest:
            return
        if method == "reset" or taken == self._length:
            self._newest, self._length = [], 0
        elif method == "crop":
            self._take_back(taken)
        elif method in _ROWS:
            (change,) = (*args, *kwargs.values())
            # what reorders rows, such as a beam search, takes no token back
            change_rows = _ROWS[method]
            self._newest = [Sums(*(change_rows(total, change) for total in self._newest[-1]))]

    def _take_back(self, tokens: int) -> None:
        if tokens >= (known := sum(map(_tokens, self._newest))):
            raise RoutingError(f"routing 'context' can take back {known - 1} tokens here, and {tokens} were asked for")
        self._length -= tokens
        while tokens >= (size := _tokens(self._newest[-1])):
            self._newest.pop()
            tokens -= size
        self._newest[-1] = Sums(*(total[:, : size - tokens] for total in self._newest[-1]))


def _tokens(sums: Sums) -> int:
    return sums.counts.shape[1]


_ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda total, rows: total.index_select(0, rows.to(total.device)),
    "batch_select_indices": lambda total, rows: total[rows],
    "batch_repeat_interleave": lambda total, repeats: total.repeat_interleave(repeats, dim=0),
}


class RouterCache(Extension):
    """What a cache gains: its router part follows it.

    Attributes:
        router_part: What it carries along.
    """

    router_part: RouterPart

    def _followed(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        before = int(self.get_seq_length())
        result = getattr(self.extended_from, method)(self, *args, **kwargs)
        self.router_part.follow(method, before - int(self.get_seq_length()), args, kwargs)
        return result


def _following(method: str) -> Any:
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return RouterCache._followed(self, method, *args, **kwargs)

    return followed


_FOLLOWED = ("crop", "reset", "activate_past_recording", *_ROWS)
RouterCache.overrides = tuple(method for method in _FOLLOWED if hasattr(Cache, method))
for _method in RouterCache.overrides:
    setattr(RouterCache, _method, _following(_method))


def carry(cache: Cache, part: RouterPart) -> None:
    """Make ``cache`` carry ``part`` along."""
    extend(cache, RouterCache)
    cache.router_part = part  # type: ignore[attr-defined]


def part_of(cache: Any, kind: type[Any], routing: str) -> Any:
    """Return the router part of a cache that a forward was given; None where there is none yet.

    Args:
        cache: What the forward was given, or None.
        kind: ``BasePass`` or ``ContextPart``.
        routing: For messages.

    Raises:
        RoutingError: The cache knows tokens that the router has not seen.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise RoutingError(
            f"routing {routing!r} needs a cache of transformers.Cache, got a {type(cache).__name__}; use generate, or "
            "another routing"
        )
    part = getattr(cache, "router_part", None)
    known = part.length() if isinstance(part, kind) else 0
    if known != int(cache.get_seq_length()):
        raise RoutingError(
            f"routing {routing!r} needs a cache that carries the router's part along: got a {type(cache).__name__} of "
            f"{int(cache.get_seq_length())} tokens of which the router knows {known}; pass no cache, an empty one, or "
            "the one that an earlier forward of this model returned"
        )
    return part if isinstance(part, kind) else None


def with_cache_renamed(kwargs: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return arguments in which a cache goes by the name that a model has for it.

    Args:
        kwargs: With the cache as ``cache`` or ``past_key_values``, if there is one.
        names: The names of the model's arguments.
    """
    given = {name: kwargs[name] for name in ("cache", "past_key_values") if name in kwargs}
    if set(given) <= {*names}:
        return kwargs
    cache = next((value for value in given.values() if value is not None), None)
    wanted = next(
        (name for name in (CACHE_NAME, "cache", "past_key_values", "cache_params") if name in names), CACHE_NAME
    )
    return {**{name: value for name, value in kwargs.items() if name not in given}, wanted: cache}


def empty_copy(cache: Cache) -> Cache:
    """Return another cache of the same kind, of one that is still empty."""
    return copy.deepcopy(cache)
