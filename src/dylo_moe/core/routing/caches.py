"""Key-value caches of transformers that carry along what the router needs of earlier tokens.

Under routing ``final`` that is the cache of the base pass, under ``context:K`` the sums over the tokens so far. A cache
remains the caller's object and of its class (dynamic, static, sliding, ...). Methods that reorder it, crop it or drop
rows of it do the same to its router part.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from dylo_moe.core.lora import Extension, extend
from dylo_moe.errors import RoutingError

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of a cache in the arguments and outputs of this version of transformers."""

_MAX_CROP = 256
"""Number of newest tokens whose sums are kept: one more than ``context`` can take back. Assisted decoding takes back
some tens at a time."""


class RunningSums(NamedTuple):
    """Sums over the tokens so far, for each token of a forward.

    Attributes:
        features: ``(batch, seq, hidden_size)``, sum of the normalized hidden states up to each token.
        counts: ``(batch, seq, 1)``, number of real tokens among them.
    """

    features: Tensor
    counts: Tensor


class RouterPart(Protocol):
    """State of the router that a cache carries along."""

    @abstractmethod
    def length(self) -> int:
        """Return the number of tokens that it covers."""

    @abstractmethod
    def follow(self, method: str, num_removed: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Do what a method of the cache did, which removed ``num_removed`` tokens."""


P = TypeVar("P", bound=RouterPart)


class BasePass(RouterPart):
    """The cache of the base pass, for routing ``final``."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    @override
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @override
    def follow(self, method: str, num_removed: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        getattr(self.cache, method)(*args, **kwargs)


class ContextPart(RouterPart):
    """Sums over the tokens so far, for routing ``context:K``; the newest tokens can be taken back."""

    def __init__(self) -> None:
        self._newest: list[RunningSums] = []
        """Sums of the newest forwards."""
        self._length = 0

    @override
    def length(self) -> int:
        return self._length

    def extend(self, sums: RunningSums, started: Tensor | None) -> RunningSums:
        """Return the sums of a forward with those of the tokens before it added.

        Args:
            sums: Sums over the forward's own tokens.
            started: ``(batch, seq, 1)``, true for tokens whose example began in this forward; None where none did.
        """
        if not self._newest:
            return sums
        kept = 1.0 if started is None else (~started).to(sums.features.dtype)
        before = (total[:, -1:].to(new.device) for total, new in zip(self._newest[-1], sums, strict=True))
        return RunningSums(*(new + old * kept for new, old in zip(sums, before, strict=True)))

    def append(self, sums: RunningSums) -> None:
        """Keep the sums of a forward that ``extend`` returned."""
        self._length += _num_tokens(sums)
        if _num_tokens(sums) > _MAX_CROP:
            # copied, so that the rest can be freed
            sums = RunningSums(*(total[:, -_MAX_CROP:].clone() for total in sums))
        self._newest.append(sums)
        while sum(map(_num_tokens, self._newest[1:])) >= _MAX_CROP:
            self._newest.pop(0)

    @override
    def follow(self, method: str, num_removed: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self._newest:
            return
        if method == "reset" or num_removed == self._length:
            self._newest, self._length = [], 0
        elif method == "crop":
            self._take_back(num_removed)
        elif method in _ROW_METHODS:
            (change,) = (*args, *kwargs.values())
            # methods that reorder rows, as beam search does, take no token back
            change_rows = _ROW_METHODS[method]
            self._newest = [RunningSums(*(change_rows(total, change) for total in self._newest[-1]))]

    def _take_back(self, tokens: int) -> None:
        """Drop the sums of the newest tokens."""
        if tokens >= (known := sum(map(_num_tokens, self._newest))):
            raise RoutingError(
                f"`routing` 'context' can take back {known - 1} tokens here, and {tokens} were asked for"
            )
        self._length -= tokens
        while tokens >= (size := _num_tokens(self._newest[-1])):
            self._newest.pop()
            tokens -= size
        self._newest[-1] = RunningSums(*(total[:, : size - tokens] for total in self._newest[-1]))


class BaseContextPart(RouterPart):
    """The cache of the base's first layers and the sums over the tokens so far, for routing ``base_context:K``.

    Args:
        cache: Cache of which the first layers are used.
        num_layers: Number of these layers, K.
    """

    def __init__(self, cache: Cache, num_layers: int) -> None:
        self.base, self.context, self._num_layers = BasePass(cache), ContextPart(), num_layers

    @override
    def length(self) -> int:
        return self.context.length()

    @override
    def follow(self, method: str, num_removed: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.context.follow(method, num_removed, args, kwargs)
        cache, layers = self.base.cache, self.base.cache.layers
        cache.layers = layers[: self._num_layers]  # the others hold nothing, and some kinds cannot crop nothing
        try:
            self.base.follow(method, num_removed, args, kwargs)
        finally:
            cache.layers = layers


def _num_tokens(sums: RunningSums) -> int:
    return sums.counts.shape[1]


_ROW_METHODS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda total, rows: total.index_select(0, rows.to(total.device)),
    "batch_select_indices": lambda total, rows: total[rows],
    "batch_repeat_interleave": lambda total, repeats: total.repeat_interleave(repeats, dim=0),
}


class RouterCache(Extension):
    """Methods that a cache gains, so that its router part follows it.

    Attributes:
        router_part: State of the router.
    """

    router_part: RouterPart
    get_seq_length: Callable[[], int]


def _following(method: str) -> Callable[..., object]:
    """Return a method that calls the cache's own ``method`` and does the same to its router part."""

    def call_and_follow(self: RouterCache, *args: object, **kwargs: object) -> object:
        before = int(self.get_seq_length())
        result: object = getattr(self.extended_from, method)(self, *args, **kwargs)
        self.router_part.follow(method, before - int(self.get_seq_length()), args, kwargs)
        return result

    return call_and_follow


_FOLLOWED = ("crop", "reset", "activate_past_recording", *_ROW_METHODS)
RouterCache.overrides = tuple(method for method in _FOLLOWED if hasattr(Cache, method))
for _method in RouterCache.overrides:
    setattr(RouterCache, _method, _following(_method))


def carry(cache: Cache, part: RouterPart) -> None:
    """Make ``cache`` carry ``part`` along."""
    extend(cache, RouterCache, router_part=part)


def part_of(cache: object, kind: type[P], routing: str) -> P | None:
    """Return the router part of a cache that a forward was given; None where there is none yet.

    Args:
        cache: Cache that the forward was given, or None.
        kind: ``BasePass`` or ``ContextPart``.
        routing: Routing mode, for messages.

    Raises:
        RoutingError: The cache holds tokens that the router has not seen.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise RoutingError(
            f"`routing` {routing!r} needs a cache of transformers.Cache, got a {type(cache).__name__}; use generate, "
            "or another mode"
        )
    part = getattr(cache, "router_part", None)
    part = part if isinstance(part, kind) else None
    length, known = int(cache.get_seq_length()), part.length() if part is not None else 0
    if known != length:
        raise RoutingError(
            f"`routing` {routing!r} needs a cache that carries the router's part along: got a {type(cache).__name__} "
            f"of {length} tokens of which the router knows {known}; pass no cache, an empty one, or the one that an "
            "earlier forward of this model returned"
        )
    return part


def with_cache_renamed(kwargs: dict[str, object], names: Collection[str]) -> dict[str, object]:
    """Return arguments in which the cache has the name that a model has for it.

    Args:
        kwargs: Arguments, with the cache as ``cache`` or ``past_key_values`` if there is one.
        names: Names of the model's arguments.
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
    """Return another cache of the same kind, for a cache that is still empty."""
    return copy.deepcopy(cache)
