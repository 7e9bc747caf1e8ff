"""Which parameters train, by who learns them, and the norms of their gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from dylo_moe.core.model import DyLoRA_MoE

ROUTER = "router"


def parameter_groups(model: DyLoRA_MoE) -> dict[str, list[nn.Parameter]]:
    """What trains: each active expert's parameters, and the router's under ``router``.

    A router that has one expert to choose from is left out: nothing depends on what it says.
    """
    groups = {name: list(model.experts.parameters(name)) for name in model.experts.active}
    if len(model.experts.active) > 1:
        groups[ROUTER] = list(model.router.gates.parameters())
    return {name: trained for name, group in groups.items() if (trained := [p for p in group if p.requires_grad])}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients of some parameters together, a scalar; 0 where there is none."""
    return _norm([parameter.grad for parameter in parameters if parameter.grad is not None], 2.0)


def largest(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The largest magnitude among the values of some parameters, a scalar; NaN if one of them is."""
    return _norm([parameter.detach() for parameter in parameters], torch.inf)


@torch.no_grad()
def _norm(tensors: list[Tensor], order: float) -> Tensor:
    norm = get_total_norm(tensors, order)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
