"""What the router did since the last log entry: sums over tokens, kept on the device, and what is made of them.

Tensors in, numbers out; who asks, when, and what is worth a warning is in ``monitoring``. Adding waits for nothing.
The device is waited for, and other processes are heard, only when the sums are taken.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.core.balance import expert_mask
from dylo_moe.core.model import DyLoRAOutput

DEAD_BELOW = 0.1
"""An expert is dead if its share of the choices is below this part of an even share."""


class RoutingSums(NamedTuple):
    """Sums over real tokens, all float64; sums of the parts of a batch, of steps and of processes add up.

    Attributes:
        tokens: ``(num_domains + 1,)``; the last entry is of tokens whose domain is not known.
        usage: ``(num_domains + 1, num_gates, num_experts)``, routing weight.
        load: ``(num_gates, num_experts)``, as ``balance.expert_load`` counts choices.
        entropy: ``()``, entropy of the routing weights in nats, averaged over the gates.
        balance_loss: ``()``, each part's share of its global batch's balance loss.
        z_loss: ``()``, the same of the router z-loss.
        carried: ``(num_gates, num_experts)``, above 0 where a gate has the expert.
    """

    tokens: Tensor
    usage: Tensor
    load: Tensor
    entropy: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    carried: Tensor

    @property
    def among(self) -> Tensor:
        """The experts that each gate has, ``(num_gates, num_experts)`` of bool."""
        return self.carried > 0

    @property
    def shares(self) -> Tensor:
        """Each expert's share of the routing weight at each gate: ``(num_gates, num_experts)``, rows sum to 1."""
        return self.usage.sum(dim=0) / self.tokens.sum().clamp(min=1)


class RoutingStatistics:
    """Adds up ``RoutingSums`` until they are taken.

    Args:
        num_domains: How many domains there are.
    """

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self._sums: RoutingSums | None = None

    def add(self, output: DyLoRAOutput, mask: Tensor, domain: Tensor | None, load: Tensor) -> None:
        """Adds a part of a global batch, with the arguments of ``routing_sums``."""
        new = routing_sums(output, mask, domain, load, self.num_domains)
        self._sums = new if self._sums is None else RoutingSums(*map(torch.add, self._sums, new))

    def take(self, reduce: Callable[[Tensor], Tensor]) -> RoutingSums | None:
        """What was added since the last time, on the CPU; None if nothing was. Waits for the device.

        Args:
            reduce: Sums a tensor over all processes.
        """
        if self._sums is None:
            return None
        sums, self._sums = self._sums, None
        # one tensor, so that there is one reduction and one copy to wait for
        flat = reduce(torch.cat([part.flatten() for part in sums])).cpu()
        parts = zip(flat.split([part.numel() for part in sums]), sums, strict=True)
        return RoutingSums(*(values.view(part.shape) for values, part in parts))


@torch.no_grad()
def routing_sums(
    output: DyLoRAOutput, mask: Tensor, domain: Tensor | None, load: Tensor, num_domains: int
) -> RoutingSums:
    """Sums over the real tokens of a part of a batch.

    Args:
        output: Of a forward with labels, in which the router ran.
        mask: ``(batch, seq)``, nonzero for real tokens.
        domain: The domain of each row, ``(batch,)``; of more rows than the batch has, where they were put behind
            each other into one; None if it is not known.
        load: What ``balance.expert_load`` gives for the part.
        num_domains: How many domains there are.
    """
    assert output.routing_weights is not None and output.router_logits is not None
    assert output.balance_loss is not None and output.z_loss is not None
    weights = output.routing_weights
    mask = mask.to(weights)
    places = _places(domain, mask, num_domains)

    def by_domain(rows: Tensor) -> Tensor:
        return rows.new_zeros(num_domains + 1, *rows.shape[1:]).index_add(0, places, rows).double()

    entropy = torch.special.entr(weights).sum(dim=-1).mean(dim=0)
    return RoutingSums(
        tokens=by_domain(mask.sum(dim=1)),
        usage=by_domain(torch.einsum("gbse,bs->bge", weights, mask)),
        load=load.double(),
        entropy=(entropy * mask).sum().double(),
        balance_loss=output.balance_loss.detach().double(),
        z_loss=output.z_loss.detach().double(),
        carried=expert_mask(output.router_logits).double(),
    )


def _places(domain: Tensor | None, mask: Tensor, unknown: int) -> Tensor:
    """The domain of each row of the mask, ``unknown`` where nobody can tell."""
    rows = len(mask)
    if domain is None:
        return torch.full((rows,), unknown, device=mask.device)
    domain = domain.to(mask.device)
    if len(domain) == rows:
        return domain
    # Rows were put behind each other into one. Which of its tokens came from which of them is not known any more.
    return torch.where((domain == domain[0]).all(), domain[0], unknown).expand(rows)


def routing_entries(sums: RoutingSums, steps: int, domains: Sequence[str], experts: Sequence[str]) -> dict[str, float]:
    """The entries of the log that ``docs/training.md`` lists under usage and router.

    Args:
        sums: Since the last entry, over all processes.
        steps: Optimiser steps since then.
        domains: Names of the domains; one without a token is left out, and all are where a token's is not known.
        experts: Names of the experts, as the columns stand.
    """
    tokens = sums.tokens.sum().clamp(min=1)
    entropy = float(sums.entropy / tokens)
    usage = sums.usage.mean(dim=1)
    entries = _shares("expert_usage", usage.sum(dim=0) / tokens, experts)
    if not sums.tokens[-1]:
        for index, domain in enumerate(domains):
            if sums.tokens[index]:
                entries |= _shares(f"expert_usage/{domain}", usage[index] / sums.tokens[index], experts)
    entries["router/entropy"] = entropy
    if greatest := float(sums.among.sum(dim=-1).log().mean()):
        entries["router/normalised_entropy"] = entropy / greatest
    entries["router/balance_loss"] = float(sums.balance_loss / steps)
    entries["router/z_loss"] = float(sums.z_loss / steps)
    entries["router/dead_experts"] = float(dead_share(sums.load, sums.among))
    return entries


def _shares(prefix: str, shares: Tensor, experts: Sequence[str]) -> dict[str, float]:
    return {f"{prefix}/{expert}": share for expert, share in zip(experts, shares.tolist(), strict=True)}


def dead_share(load: Tensor, among: Tensor) -> Tensor:
    """The share of experts that hardly any token chooses, over all gates: a scalar, 0 to 1.

    Args:
        load: ``(num_gates, num_experts)``, choices of each expert.
        among: ``(num_gates, num_experts)`` of bool, the experts that each gate has; others are not counted.
    """
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    dead = (share < DEAD_BELOW / among.sum(dim=-1, keepdim=True)) & among
    return dead.sum() / among.sum()
