"""The routing mode: where the router reads its input.

==================  =================================================================  =========
mode                the router reads                                                   passes
==================  =================================================================  =========
``final``           the base's last hidden states, without adapters and gradients      2
``prefix:K``        the hidden states entering decoder layer K; layers below K carry   1
                    no experts
``context:K``       the mean of those over the example's tokens so far                 1
``base_context:K``  that mean in the base alone; all layers may carry experts          1 + K / L
``per_layer``       each decoder layer's own input, with one gate a layer              1
==================  =================================================================  =========

Standard library only, so that flags can be checked before torch is imported. A new mode needs a ``RoutingKind`` and
its properties here, and a method of ``core.routing.hooks.RouterHooks``.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from dylo_moe.errors import RoutingError

_TEXT = re.compile(r"(?P<kind>final|per_layer|prefix|context|base_context)(:(?P<layer>\d+))?")


class RoutingKind(StrEnum):
    """Kind of input that the router reads; see the table above."""

    FINAL = "final"
    PREFIX = "prefix"
    CONTEXT = "context"
    BASE_CONTEXT = "base_context"
    PER_LAYER = "per_layer"


_WITH_LAYER = (RoutingKind.PREFIX, RoutingKind.CONTEXT, RoutingKind.BASE_CONTEXT)


@dataclass(frozen=True)
class RoutingMode:
    """Where the router reads; ``str()`` gives the text that users type and checkpoints keep.

    Attributes:
        kind: Kind of input.
        layer: Decoder layer K of ``prefix:K``, ``context:K`` and ``base_context:K``; None for the other kinds, and
            where K was left out and the number of layers is not known yet.
    """

    kind: RoutingKind
    layer: int | None = None

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> Self:
        """Read a routing mode.

        Args:
            text: ``final``, ``per_layer``, or ``prefix``, ``context`` or ``base_context``, each also with ``:K``.
            num_layers: Number of decoder layers of the model. A K that was left out becomes a quarter of it.

        Raises:
            RoutingError: The mode is unknown, or there is no decoder layer K.
        """
        match = _TEXT.fullmatch(text)
        kind = None if match is None else RoutingKind(match["kind"])
        if match is None or kind is None or (match["layer"] is not None and kind not in _WITH_LAYER):
            raise RoutingError(
                f"`routing` must be final, per_layer, prefix:K, context:K or base_context:K, got {text!r}"
            )
        if kind not in _WITH_LAYER:
            return cls(kind)
        if match["layer"] is None:
            return cls(kind, None if num_layers is None else num_layers // 4)
        layer = int(match["layer"])
        if num_layers is not None and layer >= num_layers:
            raise RoutingError(f"`routing` {kind}:K needs K from 0 to {num_layers - 1} for this model, got {text!r}")
        return cls(kind, layer)

    def __str__(self) -> str:
        return self.kind.value if self.layer is None else f"{self.kind.value}:{self.layer}"

    @property
    def first_expert_layer(self) -> int:
        """First decoder layer that carries experts."""
        return 0 if self.layer is None or self.reads_base_alone else self.layer

    @property
    def has_gate_per_layer(self) -> bool:
        """Whether each decoder layer has a gate of its own."""
        return self.kind is RoutingKind.PER_LAYER

    @property
    def reads_base_output(self) -> bool:
        """Whether the gate reads the last hidden states of a pass of the base alone."""
        return self.kind is RoutingKind.FINAL

    @property
    def reads_context(self) -> bool:
        """Whether the gate reads a mean over the tokens so far."""
        return self.kind in (RoutingKind.CONTEXT, RoutingKind.BASE_CONTEXT)

    @property
    def reads_base_alone(self) -> bool:
        """Whether the gate reads hidden states of a pass of the base alone."""
        return self.kind in (RoutingKind.FINAL, RoutingKind.BASE_CONTEXT)

    @property
    def reads_frozen_features(self) -> bool:
        """Whether no expert can change what the gates read."""
        return not self.has_gate_per_layer

    @property
    def needs_router_cache(self) -> bool:
        """Whether a key-value cache must carry along what the router needs of earlier tokens."""
        return self.reads_base_output or self.reads_context

    def num_gates(self, num_layers: int) -> int:
        """Return the number of gates of the router for a model with ``num_layers`` decoder layers."""
        return num_layers if self.has_gate_per_layer else 1

    def layers_read(self, num_layers: int) -> range:
        """Return the decoder layers whose input a gate reads, in the order of the gates."""
        if self.reads_base_output:
            return range(0)
        first = self.layer or 0
        return range(num_layers) if self.has_gate_per_layer else range(first, first + 1)
