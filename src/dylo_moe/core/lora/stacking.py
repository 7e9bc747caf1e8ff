"""Weights of several adapters as one tensor, where possible without a copy; and stacks kept between forwards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dylo_moe.core.lora.layer_experts import LayerExperts, LoraLinear


def concat_rows(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate matrices to ``(sum of rows, columns)``, without a copy where no gradient is wanted."""
    if torch.is_grad_enabled() or len({weight.shape for weight in weights}) > 1:
        return torch.cat(list(weights))
    return stacked_view(weights).flatten(0, 1)


def stacked_view(weights: Sequence[Tensor]) -> Tensor:
    """Stack weights of equal shape to ``(n, ...)``, without a copy from the second call on.

    The first call moves the weights to consecutive memory, as ``torch.nn.RNN.flatten_parameters`` does, and the stack
    is a view of that memory: it cannot be stale and needs no memory of its own. Weights that share their memory with
    anything else stay where they are, and are copied in each call.
    """
    # data pointers are unstable under torch.compile and FSDP
    if torch.compiler.is_compiling() or (dist.is_available() and dist.is_initialized()):
        return torch.stack(list(weights))
    first, last = weights[0], weights[-1]
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    consecutive = all(weight.data_ptr() == start + index * size for index, weight in enumerate(weights))
    if consecutive and first.is_contiguous() and _memory_block(first) == _memory_block(last):
        return first.detach().as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    # outside inference mode: a tensor made in it could not be trained later
    with torch.inference_mode(False), torch.no_grad():
        stack = torch.stack([weight.detach() for weight in weights])
        # move the weights only if they fill their memory blocks and no other process maps them
        fill = sum(dict(map(_memory_block, weights)).values()) == len(weights) * size
        if fill and not (first.device.type == "cpu" and any(weight.is_shared() for weight in weights)):
            for weight, row in zip(weights, stack, strict=True):
                weight.data = row
    return stack


def _memory_block(tensor: Tensor) -> tuple[int, int]:
    """Return address and size in bytes of the memory block that holds a tensor."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class UpStack(NamedTuple):
    """The active experts of one layer with their ``B``, concatenated to ``(out_features, sum of ranks)``."""

    experts: LayerExperts
    weight: Tensor


class WeightStackCache:
    """Stacked weights that are kept from one forward to the next, until a weight is written to or moved.

    Attributes:
        up: Stack of each layer.
        down: For each layer: the layers of its shared-input group that have the same experts, and all their ``A``
            concatenated by rows.
    """

    def __init__(self) -> None:
        self.up: dict[LoraLinear, UpStack] = {}
        self.down: dict[LoraLinear, tuple[list[LoraLinear], Tensor]] = {}
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._versioned: list[Tensor] = []
        self._versions: list[int] = []

    def watch(self, weights: list[Tensor]) -> None:
        """Remember version and address of weights that were stacked."""
        # a tensor made in inference mode has no version; only inference can write to it
        versioned = [weight for weight in weights if not weight.is_inference()]
        self._weights += weights
        self._addresses += [weight.data_ptr() for weight in weights]
        self._versioned += versioned
        self._versions += [weight._version for weight in versioned]

    def drop_if_stale(self) -> None:
        """Drop every stack if any watched weight was written to or moved."""
        versions = [weight._version for weight in self._versioned]
        if self._versions != versions or self._addresses != [weight.data_ptr() for weight in self._weights]:
            self.up.clear()
            self.down.clear()
            for watched in (self._weights, self._addresses, self._versioned, self._versions):
                watched.clear()
