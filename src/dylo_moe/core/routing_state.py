"""What the routed layers of one model share: the weights that hold now, and what one of them computed for others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from dylo_moe.core.context import Context
from dylo_moe.core.mixture import TokenWeights
from dylo_moe.core.router import RouterOutput


class Experts(NamedTuple):
    """The active experts of one layer.

    Attributes:
        places: Where they stand among the model's active adapters; None where the layer has them all.
        names: Their names.
        ranks: Rank of each.
        scalings: Scaling of each.
    """

    places: tuple[int, ...] | None
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class Stack(NamedTuple):
    """One layer's active experts, and their ``B`` beside each other: ``(out_features, sum of ranks)``."""

    experts: Experts
    up: Tensor


class Shared(NamedTuple):
    """What a layer computed for its siblings, the layers that are fed alike.

    Attributes:
        product: By which product, ``dense`` or ``sparse``.
        x: The input that it holds for.
        weights: The routing weights that it holds for.
        parts: In rank space, for each layer that has not fetched its own yet.
    """

    product: str
    x: Tensor
    weights: TokenWeights
    parts: dict[nn.Module, Tensor]


class KeptStacks:
    """Stacked weights that outlive a forward: within one ``generate``, while no weight is written to or moved."""

    def __init__(self) -> None:
        self.stacks: dict[nn.Module, Stack] = {}
        self.siblings: dict[nn.Module, tuple[list[nn.Module], Tensor]] = {}
        self._noted: list[Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []

    def note(self, weights: list[Tensor]) -> None:
        """Remembers what was stacked, as it is now."""
        self._noted += weights
        self._versions += [weight._version for weight in weights]
        self._addresses += [weight.data_ptr() for weight in weights]

    def drop_if_stale(self) -> None:
        """Forgets everything if any of the weights changed."""
        versions = [weight._version for weight in self._noted]
        if self._versions != versions or self._addresses != [weight.data_ptr() for weight in self._noted]:
            for everything in (self.stacks, self.siblings, self._noted, self._versions, self._addresses):
                everything.clear()


class RoutingState:
    """What the routed layers of one model share while a forward runs.

    Attributes:
        weights: The routing weights for the layers that run next; None for plain PEFT.
        base_only: Whether the layers leave out every adapter.
        given: Whether ``weights`` came from the caller, so that no router may replace them.
        context: What the forward says of its tokens, under routing ``context:K``.
        record: Where the router's outputs are collected; None where nobody asked.
        shared: What a layer computed for its siblings.
        kept: Stacked weights from the forward before; None where each forward stacks anew.
    """

    def __init__(self) -> None:
        self.weights: TokenWeights | None = None
        self.base_only = False
        self.given = False
        self.context = Context()
        self.record: list[RouterOutput] | None = None
        self.shared: Shared | None = None
        self.kept: KeptStacks | None = None

    @contextmanager
    def scope(
        self, weights: TokenWeights | None = None, *, given: bool = False, base_only: bool = False
    ) -> Iterator[None]:
        """Sets the state for a block of code, and restores what was there before."""
        before = self.weights, self.given, self.base_only
        self.weights, self.given, self.base_only = weights, given, base_only
        try:
            yield
        finally:
            self.weights, self.given, self.base_only = before

    def forget(self) -> None:
        """Lets go of what belonged to a forward that has ended, its cache among it."""
        self.weights, self.given, self.context, self.shared = None, False, Context(), None

    @contextmanager
    def keeping_stacks(self) -> Iterator[None]:
        """Lets the forwards in a block of code, the steps of one generation, share their stacked weights."""
        before, self.kept = self.kept, KeptStacks()
        try:
            yield
        finally:
            self.kept = before

    @contextmanager
    def recording(self) -> Iterator[list[RouterOutput]]:
        """Collects what the router gave in one forward, for each gate in order."""
        before, self.record = self.record, []
        try:
            yield self.record
        finally:
            self.record = before
