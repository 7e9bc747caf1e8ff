"""Balance between the experts as pure functions: their load, the router's losses, and the selection bias.

As in ``losses``, a loss divided by a count over the whole global batch (``num_tokens``) adds up over its parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_load(router_logits: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """Count the real tokens that select each expert, each selection as ``1 / top_k`` of a token.

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``, with the selection bias added if there is one; -inf for
            an expert that a gate does not have.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        top_k: Number of experts that each token selects.

    Returns:
        ``(num_gates, num_experts)`` in the logits' dtype, float32 at least; rows sum to the number of real tokens.
        Loads of the parts of a batch add up.
    """
    num_experts = router_logits.shape[-1]
    k = min(top_k, num_experts)
    topk_expert_ids = router_logits.detach().topk(k, dim=-1).indices
    counts = F.one_hot(topk_expert_ids, num_experts).sum(dim=-2) * expert_mask(router_logits)[:, None, None]
    counts = counts / counts.sum(dim=-1, keepdim=True)
    return (counts * _token_mask(router_logits, mask)).sum(dim=(1, 2))


def load_balance_loss(
    router_logits: Tensor,
    mask: Tensor | None,
    top_k: int,
    *,
    load: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """Return ``E * sum_e f_e * P_e`` over real tokens, averaged over the gates; 1.0 when routing is uniform.

    ``f_e`` is the share of tokens that select expert e and ``P_e`` its mean softmax probability (GShard, Lepikhin
    et al. 2020; Switch Transformers, Fedus et al. 2021, equation 4). The gradient flows through ``P`` alone.

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``; -inf for an expert that a gate does not have, which is
            not counted in E.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        top_k: Number of experts that each token selects.
        load: ``f`` from a larger batch, ``(num_gates, num_experts)`` in any positive scale; this batch's own by
            default. A fixed ``f`` makes the loss additive over micro-batches, and balancing over a larger batch
            leaves experts room to specialize (Qiu et al. 2025, "Demons in the Detail").
        num_tokens: Number of real tokens to divide by; this batch's own by default.

    Returns:
        A scalar.
    """
    if load is None:
        load = expert_load(router_logits, mask, top_k)
    fraction = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    real = _token_mask(router_logits, mask)
    probability = (router_logits.softmax(dim=-1) * real).sum(dim=(1, 2)) / _num_tokens(real, num_tokens)
    num_experts = expert_mask(router_logits).sum(dim=-1)
    return (num_experts * (fraction * probability).sum(dim=-1)).mean()


def router_z_loss(router_logits: Tensor, mask: Tensor | None, *, num_tokens: Tensor | int | None = None) -> Tensor:
    """Return the mean squared log-sum-exp of the router's logits (ST-MoE, Zoph et al. 2022, equation 5).

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        num_tokens: Number of real tokens to divide by; this batch's own by default.

    Returns:
        A scalar, averaged over the gates.
    """
    real = _token_mask(router_logits, mask)
    squared = router_logits.logsumexp(dim=-1, keepdim=True).square()
    return ((squared * real).sum(dim=(1, 2, 3)) / _num_tokens(real, num_tokens)).mean()


def updated_selection_bias(bias: Tensor, load: Tensor, rate: float = 1e-3, mask: Tensor | None = None) -> Tensor:
    """Return the selection bias after one step of auxiliary-loss-free balancing (DeepSeek-V3, 2024, section 2.1.2).

    Args:
        bias: Selection bias of the router, ``(num_gates, num_experts)``.
        load: ``(num_gates, num_experts)``, number of tokens that selected each expert since the last step.
        rate: Size of the step.
        mask: ``(num_gates, num_experts)``, the experts that each gate has; all by default. The others keep their bias.

    Returns:
        The new bias: raised by ``rate`` where an expert was selected less than its fair share, lowered where more.
    """
    mask = torch.ones_like(load) if mask is None else mask.to(load)
    fair = load.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True)
    return bias + rate * torch.sign(fair - load) * mask


def expert_mask(router_logits: Tensor) -> Tensor:
    """Return the experts that each gate has, whose logits are not -inf: ``(num_gates, num_experts)`` of bool."""
    return router_logits[:, 0, 0] != -torch.inf


def _token_mask(router_logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask of real tokens as ``(1, batch, seq, 1)`` in the logits' dtype."""
    if mask is None:
        mask = router_logits.new_ones(router_logits.shape[1:3])
    return mask.to(router_logits)[None, :, :, None]


def _num_tokens(mask: Tensor, given: Tensor | int | None) -> Tensor | int:
    # clamped: a batch of padding alone has the loss 0, not 0/0
    return given if given is not None else mask.sum().clamp(min=1)
