"""PEFT's LoRA layers as routing reads them: their attributes and their active experts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dylo_moe.core.base import is_wrapped


class LoraLinear(Protocol):
    """The attributes of PEFT's LoRA layers that routing uses."""

    training: bool
    base_layer: nn.Module
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Module]
    scaling: dict[str, float]
    merged_adapters: list[str]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active in the whole model."""

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer leaves out its adapters."""

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base layer."""

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the layer's parameters."""

    def requires_grad_(self, requires_grad: bool = True) -> object:
        """Set whether the layer's parameters train."""


class LayerExperts(NamedTuple):
    """The active experts of one layer.

    Attributes:
        columns: Their columns of the routing weights; None where the layer has every active adapter.
        names: Name of each.
        ranks: Rank of each.
        scalings: Scaling of each.
        readable: Whether their matrices can be read directly; see ``_has_readable_matrices``.
    """

    columns: tuple[int, ...] | None
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    readable: bool


def active_experts(layer: LoraLinear) -> LayerExperts:
    """Return the active experts of a layer."""
    active, lora_a, scaling = layer.active_adapters, layer.lora_A, layer.scaling
    names = tuple([name for name in active if name in lora_a])
    return LayerExperts(
        None if len(names) == len(active) else tuple([active.index(name) for name in names]),
        names,
        tuple([len(lora_a[name].weight) for name in names]),
        tuple([scaling[name] for name in names]),
        _has_readable_matrices(layer, names),
    )


def _has_readable_matrices(layer: LoraLinear, names: Iterable[str]) -> bool:
    """Return whether the matrices of a layer's experts can be read directly instead of calling their modules.

    Not where hooks or a wrapped forward do more than multiply: offloading, for one, puts a matrix in place only while
    its module runs.
    """
    lora_a, lora_b = layer.lora_A, layer.lora_B
    return not any(is_wrapped(lora_a[name]) or is_wrapped(lora_b[name]) for name in names)
