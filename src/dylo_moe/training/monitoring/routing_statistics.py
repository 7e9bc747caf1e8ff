"""Routing statistics since the last log entry: sums over tokens, and the figures computed from them.

Tensors in, numbers out; when to log and when to warn is in ``callbacks``. Adding does not synchronize with the device
or with other processes; taking the sums does both, once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.core import DyLoRAOutput, expert_mask, routing_shares

_DEAD_BELOW = 0.1
"""Fraction of an even share of the choices below which an expert counts as dead."""


class RoutingSums(NamedTuple):
    """Sums over real tokens, all float64; they add up over the parts of a batch, over steps and over processes.

    Attributes:
        tokens: Number of tokens, ``(num_domains + 1,)``; the last entry counts tokens of unknown domain.
        usage: Routing weight, ``(num_domains + 1, num_gates, num_experts)``.
        load: Number of choices as ``balance.expert_load`` counts them, ``(num_gates, num_experts)``.
        entropy: Entropy of the routing weights in nats, averaged over the gates; a scalar.
        balance_loss: Each part's share of its global batch's balance loss; a scalar.
        z_loss: Each part's share of its global batch's router z-loss; a scalar.
        mask_count: Number of summed parts in which the gate had the expert, ``(num_gates, num_experts)``.
    """

    tokens: Tensor
    usage: Tensor
    load: Tensor
    entropy: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    mask_count: Tensor

    @property
    def expert_mask(self) -> Tensor:
        """The experts that each gate has, ``(num_gates, num_experts)`` of bool."""
        return self.mask_count > 0

    @property
    def shares(self) -> Tensor:
        """Each expert's share of the routing weight at each gate, ``(num_gates, num_experts)``; rows sum to 1."""
        return self.usage.sum(dim=0) / self.tokens.sum().clamp(min=1)


class RoutingStatistics:
    """Running ``RoutingSums``, reset each time they are taken.

    Args:
        num_domains: Number of domains.
    """

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self._sums: RoutingSums | None = None

    def add(self, output: DyLoRAOutput, mask: Tensor, domain: Tensor | None, load: Tensor) -> None:
        """Add a part of a global batch; the arguments are those of ``routing_sums``."""
        new = routing_sums(output, mask, domain, load, self.num_domains)
        self._sums = new if self._sums is None else RoutingSums(*map(torch.add, self._sums, new))

    def take(self, reduce: Callable[[Tensor], Tensor]) -> RoutingSums | None:
        """Return the sums since the last call, on the CPU, and reset them; None if nothing was added.

        Args:
            reduce: Function that sums a tensor over all processes.
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
    """Return sums over the real tokens of a part of a batch.

    Args:
        output: Output of a forward with labels, in which the router ran.
        mask: ``(batch, seq)``, nonzero for real tokens.
        domain: Domain index of each row, ``(batch,)``, or of each row before rows were concatenated into one; None if
            unknown.
        load: Result of ``balance.expert_load`` for the part, ``(num_gates, num_experts)``.
        num_domains: Number of domains.
    """
    assert output.routing_weights is not None and output.router_logits is not None
    assert output.balance_loss is not None and output.z_loss is not None
    weights = routing_shares(output.routing_weights)
    mask = mask.to(weights)
    domain_of_row = _domain_of_rows(domain, mask, num_domains)

    def by_domain(rows: Tensor) -> Tensor:
        return rows.new_zeros(num_domains + 1, *rows.shape[1:]).index_add(0, domain_of_row, rows).double()

    entropy = torch.special.entr(weights).sum(dim=-1).mean(dim=0)
    return RoutingSums(
        tokens=by_domain(mask.sum(dim=1)),
        usage=by_domain(torch.einsum("gbse,bs->bge", weights, mask)),
        load=load.double(),
        entropy=(entropy * mask).sum().double(),
        balance_loss=output.balance_loss.detach().double(),
        z_loss=output.z_loss.detach().double(),
        mask_count=expert_mask(output.router_logits).double(),
    )


def _domain_of_rows(domain: Tensor | None, mask: Tensor, unknown: int) -> Tensor:
    """Return the domain index of each row of the mask, or ``unknown``; int64, ``(batch,)``."""
    rows = len(mask)
    if domain is None:
        return torch.full((rows,), unknown, device=mask.device)
    domain = domain.to(mask.device)
    if len(domain) == rows:
        return domain
    # concatenated rows: which tokens came from which row is lost
    return torch.where((domain == domain[0]).all(), domain[0], unknown).expand(rows)


def routing_entries(sums: RoutingSums, steps: int, domains: Sequence[str], experts: Sequence[str]) -> dict[str, float]:
    """Return the log entries that ``docs/training.md`` lists under usage and router.

    Args:
        sums: Sums since the last entry, over all processes.
        steps: Number of optimizer steps since the last entry.
        domains: Names of the domains. A domain without tokens is left out; all are if some token's is unknown.
        experts: Names of the experts, in column order.
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
    if greatest := float(sums.expert_mask.sum(dim=-1).log().mean()):
        entries["router/normalised_entropy"] = entropy / greatest
    entries["router/balance_loss"] = float(sums.balance_loss / steps)
    entries["router/z_loss"] = float(sums.z_loss / steps)
    entries["router/dead_experts"] = float(dead_share(sums.load, sums.expert_mask))
    return entries


def _shares(prefix: str, shares: Tensor, experts: Sequence[str]) -> dict[str, float]:
    return {f"{prefix}/{expert}": share for expert, share in zip(experts, shares.tolist(), strict=True)}


def dead_share(load: Tensor, expert_mask: Tensor) -> Tensor:
    """Return the share of experts that hardly any token chooses, over all gates: a scalar, 0 to 1.

    Args:
        load: Number of choices of each expert, ``(num_gates, num_experts)``.
        expert_mask: The experts that each gate has, ``(num_gates, num_experts)`` of bool; others are not counted.
    """
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    dead = (share < _DEAD_BELOW / expert_mask.sum(dim=-1, keepdim=True)) & expert_mask
    return dead.sum() / expert_mask.sum()
