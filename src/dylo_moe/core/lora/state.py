"""State that the routed layers of one model share; what belongs to one forward is in its ``ForwardCall``.

A call belongs to the thread that runs it, so forwards in several threads do not meet. What holds for a block of code
(``base_only``, the weights that a generation keeps stacked) is context-local, so that tasks of an event loop do not
meet either. No state of a forward is left on the model, however the forward ends.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dylo_moe.core.lora.layer_experts import LoraLinear
from dylo_moe.core.lora.stacking import WeightStackCache
from dylo_moe.core.lora.token_weights import TokenWeights

Run = Callable[..., Any]
"""A module's own forward."""


class SharedProjection(NamedTuple):
    """Projection into rank space that one layer computed for every layer of its shared-input group.

    Attributes:
        sparse: Whether it is of the top-k experts alone.
        x: Input that was projected.
        weights: Routing weights that it was multiplied by.
        parts: Projection of each layer that has not taken its part yet.
    """

    sparse: bool
    x: Tensor
    weights: TokenWeights
    parts: dict[LoraLinear, Tensor]


@dataclass
class ForwardRecord:
    """Results of one forward that its caller asked for.

    Attributes:
        wants_features: Whether to keep the backbone's output.
        ends_with_routes: Whether the forward ends, by ``RoutesFound``, when the first gate has run.
        features: Output of the backbone, ``(batch, seq, hidden_size)``.
        router_logits: Logits of each gate, ``(batch, seq, num_active_experts)``, in order.
        routing_weights: Routing weights of each gate, of the same shape.
    """

    wants_features: bool = False
    ends_with_routes: bool = False
    features: Tensor | None = None
    router_logits: list[Tensor] = field(default_factory=list)
    routing_weights: list[Tensor] = field(default_factory=list)


class RoutesFound(Exception):
    """Ends a forward of which only the routes are wanted."""


class Scope(NamedTuple):
    """Settings for the forwards in a block of code.

    Attributes:
        base_only: Whether every adapter is left out.
        weights: Routing weights for the texts of a generation, ``(rows, tokens, num_active_experts)``.
        record: Record that the next forward fills in.
        stack_cache: Stacked weights of earlier forwards; None where each forward stacks its own.
    """

    base_only: bool = False
    weights: Tensor | None = None
    record: ForwardRecord | None = None
    stack_cache: WeightStackCache | None = None


class ForwardCall:
    """One forward, as the routed layers see it.

    Attributes:
        module: Module that was called: the causal LM, or its backbone alone.
        weights: Routing weights for the layers that run next; None for plain PEFT.
        weights_from_caller: Whether the caller gave ``weights``, so that no router may replace them.
        base_only: Whether the layers leave out every adapter.
        record: Record to fill in; None where the caller asked for none.
        stack_cache: Stacked weights of earlier forwards.
        router_input: Input of the router's hooks besides the hidden states; only they read it.
        router_result: Result that the router's hooks need after the forward; only they read it.
        token_mask: ``(batch, past + seq)``, nonzero for real tokens, where the attention mask has another form.
        gates_run: Number of gates that ran.
        running: Modules whose own forward runs now, outermost first.
        shared_projection: Projection that a layer computed for its whole group.
    """

    def __init__(self, module: object, scope: Scope, weights: Tensor | None = None) -> None:
        self.module = module
        self.weights = None if weights is None else TokenWeights(weights)
        self.weights_from_caller = weights is not None
        self.base_only, self.record, self.stack_cache = scope.base_only, scope.record, scope.stack_cache
        self.router_input: object = None
        self.router_result: object = None
        self.token_mask: Tensor | None = None
        self.gates_run = 0
        self.running: list[object] = []
        self.shared_projection: SharedProjection | None = None
        self._row: tuple[Tensor, Tensor] | None = None

    @property
    def stacks(self) -> WeightStackCache | None:
        """The stack cache to use now; None where a gradient must reach the weights."""
        return None if torch.is_grad_enabled() else self.stack_cache

    def as_one_row(self, x: Tensor) -> Tensor:
        """Return ``(tokens, features)`` as ``(1, tokens, features)``, the same object for the same ``x``."""
        if self._row is None or self._row[0] is not x:
            self._row = x, x.unsqueeze(0)
        return self._row[1]

    def for_recomputation(self) -> "ForwardCall":
        """Return a call for a part of this forward that runs again in the backward pass."""
        call = ForwardCall(self.module, Scope(base_only=self.base_only))
        call.weights, call.weights_from_caller = self.weights, self.weights_from_caller
        call.router_input = self.router_input
        call.drop_derived()
        return call

    def drop_derived(self) -> None:
        """Drop what layers computed for later ones, so that a part that runs again computes the same tensors."""
        self.shared_projection = None
        self.weights = self.weights and TokenWeights(self.weights.weights, self.weights.topk_expert_ids)


class Hooks(Protocol):
    """Interface of a router's hooks on the forwards of a model; see ``hooks.RouterHooks``."""

    def remove(self) -> None:
        """Take the hooks off the model."""

    def check(self, call: ForwardCall) -> None:
        """Raise ``RoutingError`` unless the router ran in a forward that has ended."""

    def run_backbone(self, call: ForwardCall, run: Run, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Run the backbone's own forward, with its arguments, and return its output."""


class RoutingState:
    """State that the routed layers of one model share.

    Attributes:
        hooks: Hooks of the router, where there is a router.
        adapters: Names of the adapters whose layers are routed.
        has_shared_expert: Whether the last active adapter is always on, at weight 1; the router has no column for it.
        route_new_adapters: Called before a forward that routes: routes the layers of adapters that were added since.
    """

    def __init__(self) -> None:
        self.hooks: Hooks | None = None
        self.adapters: tuple[str, ...] = ()
        self.has_shared_expert = False
        self.route_new_adapters: Callable[[], None] | None = None
        self._thread = threading.local()
        self._scope: ContextVar[Scope] = ContextVar("scope", default=Scope())  # noqa: B039 - it is immutable

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle it without the calls and scopes of this process."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return RoutingState, (), kept

    @property
    def call(self) -> ForwardCall | None:
        """The forward that this thread runs; None outside of one."""
        call: ForwardCall | None = getattr(self._thread, "call", None)
        return call

    @property
    def scope(self) -> Scope:
        """The settings for the next forward."""
        if torch.compiler.is_compiling():  # which cannot read a context variable
            scope: Scope = getattr(self._thread, "scope", _DEFAULT)
            return scope
        return self._scope.get()

    @contextmanager
    def forward(self, call: ForwardCall) -> Iterator[None]:
        """Make ``call`` this thread's forward for a block of code."""
        outer = self.call
        self._thread.call = call
        try:
            yield
        finally:
            self._thread.call = outer

    @contextmanager
    def scoped(self, **changes: Any) -> Iterator[None]:
        """Change fields of ``scope`` for a block of code."""
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
    def cache_stacks(self) -> Iterator[None]:
        """Let the forwards in a block of code, the steps of one generation, share their stacked weights."""
        with self.scoped(stack_cache=WeightStackCache()):
            yield


_DEFAULT = Scope()
