"""What the routed layers of one model share. What belongs to a forward is in a ``Call``, made for it and gone with it.

A call is kept for the thread that runs it, so forwards in several threads do not meet. What holds for a block of code
(``base_only``, the weights that a generation keeps stacked) is context-local, so that tasks of an event loop do not
meet either. Nothing of a forward is left on the model, however the forward ends.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dylo_moe.core.caches import Sums
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
        plain: Whether their matrices may be read past the modules that hold them.
    """

    places: tuple[int, ...] | None
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    plain: bool


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
        self._versioned: list[Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []

    def note(self, weights: list[Tensor]) -> None:
        """Remember what was stacked, as it is now."""
        # a tensor made in inference mode has no version; nothing but inference can write to it
        versioned = [weight for weight in weights if not weight.is_inference()]
        self._noted += weights
        self._versioned += versioned
        self._versions += [weight._version for weight in versioned]
        self._addresses += [weight.data_ptr() for weight in weights]

    def drop_if_stale(self) -> None:
        """Forget everything if any of the weights changed."""
        versions = [weight._version for weight in self._versioned]
        if self._versions != versions or self._addresses != [weight.data_ptr() for weight in self._noted]:
            noted = self._noted, self._versioned, self._versions, self._addresses
            for everything in (self.stacks, self.siblings, *noted):
                everything.clear()


@dataclass
class Record:
    """What a caller wants to know of one forward.

    Attributes:
        wants_features: Whether the backbone's output is wanted.
        features: ``(batch, seq, hidden_size)``, the backbone's output.
        outputs: What each gate gave, in order.
    """

    wants_features: bool = False
    features: Tensor | None = None
    outputs: list[RouterOutput] = field(default_factory=list)


class Scope(NamedTuple):
    """What holds for the forwards in a block of code.

    Attributes:
        base_only: Whether every adapter is left out.
        weights: Routing weights for the texts of a generation, ``(rows, tokens, num_active_experts)``.
        record: Where the next forward tells what it did.
        kept: Stacked weights from the forward before; None where each forward stacks anew.
    """

    base_only: bool = False
    weights: Tensor | None = None
    record: Record | None = None
    kept: KeptStacks | None = None


class Call:
    """One forward, as the routed layers see it.

    Attributes:
        module: What was called: the causal LM, or its backbone alone.
        weights: The routing weights for the layers that run next; None for plain PEFT.
        given: Whether ``weights`` came from the caller, so that no router may replace them.
        base_only: Whether the layers leave out every adapter.
        record: Where the router's outputs are collected; None where nobody asked.
        kept: Stacked weights from the forward before.
        context: What the forward says of its tokens, under routing ``context:K``.
        sums: What routing ``context:K`` added up.
        token_mask: ``(batch, past + seq)``, nonzero for real tokens, where the attention mask does not say.
        gates: How many gates ran.
        inside: The modules whose own forward runs now.
        shared: What a layer computed for its siblings.
    """

    def __init__(self, module: nn.Module, scope: Scope, weights: Tensor | None = None) -> None:
        self.module = module
        self.weights = None if weights is None else TokenWeights(weights)
        self.given = weights is not None
        self.base_only, self.record, self.kept = scope.base_only, scope.record, scope.kept
        self.context = Context()
        self.sums: Sums | None = None
        self.token_mask: Tensor | None = None
        self.gates = 0
        self.inside: list[nn.Module] = []
        self.shared: Shared | None = None
        self._row: tuple[Tensor, Tensor] | None = None

    def as_one_row(self, x: Tensor) -> Tensor:
        """Return ``(tokens, features)`` as ``(1, tokens, features)``, the same object for the same ``x``."""
        if self._row is None or self._row[0] is not x:
            self._row = x, x.unsqueeze(0)
        return self._row[1]

    def again(self) -> "Call":
        """Return a call for a part of this forward that runs once more, in the backward pass."""
        call = Call(self.module, Scope(base_only=self.base_only))
        call.weights, call.given, call.context = self.weights, self.given, self.context
        call.derive_anew()
        return call

    def derive_anew(self) -> None:
        """Let the layers that run next derive for themselves what they need, as they will when they run once more."""
        self.shared = None
        self.weights = self.weights and TokenWeights(self.weights.weights, self.weights.chosen)


class RoutingState:
    """What the routed layers of one model share.

    Attributes:
        hooks: The router's, where there is a router; its ``remove`` takes them off.
        adapters: The names of the adapters whose layers are routed.
        take_up: Called before a forward that routes: routes the layers of adapters that were added since.
    """

    def __init__(self) -> None:
        self.hooks: Any = None
        self.adapters: tuple[str, ...] = ()
        self.take_up: Callable[[], None] | None = None
        self._thread = threading.local()
        self._scope: ContextVar[Scope] = ContextVar("scope", default=Scope())  # noqa: B039 - it is immutable

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it without the calls and scopes of this process."""
        return RoutingState, (), {"hooks": self.hooks, "adapters": self.adapters, "take_up": self.take_up}

    @property
    def call(self) -> Call | None:
        """The forward that this thread runs; None outside of one."""
        call: Call | None = getattr(self._thread, "call", None)
        return call

    @property
    def scope(self) -> Scope:
        """What holds for the next forward."""
        if torch.compiler.is_compiling():  # which cannot read a context variable
            scope: Scope = getattr(self._thread, "scope", _DEFAULT)
            return scope
        return self._scope.get()

    @contextmanager
    def forward(self, call: Call) -> Iterator[None]:
        """Make ``call`` this thread's for a block of code."""
        outer = self.call
        self._thread.call = call
        try:
            yield
        finally:
            self._thread.call = outer

    @contextmanager
    def scoped(self, **changes: Any) -> Iterator[None]:
        """Change what holds for the forwards in a block of code."""
        before = self.scope
        self._set_scope(before._replace(**changes))
        try:
            yield
        finally:
            self._set_scope(before)

    def _set_scope(self, scope: Scope) -> None:
        self._thread.scope = scope
        if not torch.compiler.is_compiling():
            self._scope.set(scope)

    @contextmanager
    def keeping_stacks(self) -> Iterator[None]:
        """Let the forwards in a block of code, the steps of one generation, share their stacked weights."""
        with self.scoped(kept=KeptStacks()):
            yield


_DEFAULT = Scope()
