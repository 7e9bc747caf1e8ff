"""The parameters that train, grouped by expert and router, and norms over them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from dylo_moe.core import DyLoRA_MoE

ROUTER = "router"


def parameter_groups(model: DyLoRA_MoE) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of each active expert by its name, and the router's under ``router``.

    A router with a single active expert is left out: its output changes nothing.
    """
    groups = {name: list(model.experts.parameters(name)) for name in model.experts.active_adapters}
    if len(model.experts.active) > 1:
        groups[ROUTER] = list(model.router.gates.parameters())
    return {name: trained for name, group in groups.items() if (trained := [p for p in group if p.requires_grad])}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm over all gradients of some parameters, a scalar; 0 if they have none."""
    return _norm([parameter.grad for parameter in parameters if parameter.grad is not None], 2.0)


def max_abs(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the largest absolute value in some parameters, a scalar; NaN if one of them is NaN."""
    return _norm([parameter.detach() for parameter in parameters], torch.inf)


@torch.no_grad()
def _norm(tensors: list[Tensor], order: float) -> Tensor:
    norm = get_total_norm(tensors, order)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
