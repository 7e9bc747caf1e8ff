"""Metrics of an evaluation, as pure functions over per-example sums.

Losses are means over labelled tokens and usage is a mean over real tokens, however the examples were batched.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dylo_moe.core import IGNORE_INDEX, DyLoRAOutput, routing_shares, token_cross_entropy

LOSS_SUM, LABELLED, REAL, FIRST_EXPERT = 0, 1, 2, 3
"""Columns of ``example_sums``; those of the experts come last."""


def example_sums(output: DyLoRAOutput, labels: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """Return sums over the tokens of each example.

    Args:
        output: Output of a forward without labels.
        labels: ``(batch, seq)``, -100 where there is no loss.
        mask: ``(batch, seq)``, nonzero for real tokens.
        num_experts: Number of columns for the experts; they are 0 if the router did not run.

    Returns:
        ``(batch, 3 + num_experts)`` float64: cross-entropy in nats, number of labelled tokens, number of real tokens,
        and each expert's routing weight, averaged over the gates.
    """
    assert output.logits is not None
    loss = token_cross_entropy(output.logits, labels).sum(dim=1)
    labelled = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    usage = torch.zeros(len(labels), num_experts, device=loss.device)
    if output.routing_weights is not None:
        usage = (routing_shares(output.routing_weights).mean(dim=0) * mask[..., None]).sum(dim=1)
    return torch.cat([torch.stack([loss, labelled, mask.sum(dim=1)], dim=1).double(), usage.double()], dim=1)


def domain_metrics(
    sums: NDArray[np.float64], domain_of: NDArray[np.int64], domains: Sequence[str], experts: Sequence[str]
) -> dict[str, float]:
    """Return the loss per domain, over all tokens and averaged over the domains, and router usage per domain.

    Args:
        sums: Rows of ``example_sums``.
        domain_of: Domain of each row, an index into ``domains``.
        domains: Names of the domains; one without rows is left out.
        experts: Names of the experts, in column order.

    Returns:
        ``loss``, ``mean_domain_loss`` and ``loss/<domain>`` in nats per labelled token, and
        ``usage/<domain>/<expert>``, fractions that sum to 1 over the experts (left out if the router did not run).
        Where experts are called as their domains are, ``route_accuracy`` is the mean share that goes to the right one.
    """
    metrics = {"loss": float(sums[:, LOSS_SUM].sum() / max(1.0, sums[:, LABELLED].sum()))}
    for index, domain in enumerate(domains):
        rows = sums[domain_of == index]
        if not len(rows):
            continue
        metrics[f"loss/{domain}"] = float(rows[:, LOSS_SUM].sum() / max(1.0, rows[:, LABELLED].sum()))
        usage = rows[:, FIRST_EXPERT:].sum(axis=0) / rows[:, REAL].sum()
        if usage.any():
            metrics.update(
                {f"usage/{domain}/{expert}": float(share) for expert, share in zip(experts, usage, strict=True)}
            )
    own = [metrics[key] for domain in domains if (key := f"usage/{domain}/{domain}") in metrics]
    if own:
        metrics["route_accuracy"] = float(np.mean(own))
    losses = [value for key, value in metrics.items() if key.startswith("loss/")]
    metrics["mean_domain_loss"] = float(np.mean(losses))
    return metrics
