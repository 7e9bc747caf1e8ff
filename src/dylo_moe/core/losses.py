"""The losses as pure functions: tensors in, tensor out.

Each token's share of a loss is additive. Divided by a count over the whole global batch (``num_items``,
``num_tokens``) the parts of an accumulated or distributed batch therefore add up to exactly what one large
batch gives; with no count given, each function divides by its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
ROWS_AT_ONCE = 256
"""Tokens whose logits ``linear_causal_lm_loss`` holds at a time: enough for a quick product, few beside a batch."""

_Options = getattr(nn, "LinearCrossEntropyOptions", None)
"""The options of torch's chunked loss; None before torch 2.13, which has no such loss."""


def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of each labelled token given the tokens before it.

    Args:
        logits: ``(batch, seq, vocab)``.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.
        num_items: Labelled tokens to divide by.

    Returns:
        A float32 scalar (float64 for float64 logits), in nats per token.
    """
    per_token = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return per_token.sum() / _count(labels[:, 1:] != IGNORE_INDEX, num_items)


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token given the tokens before it, 0 where there is no label.

    Args:
        logits: ``(batch, seq, vocab)``.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.

    Returns:
        ``(batch, seq - 1)`` in float32 (float64 for float64 logits), in nats.
    """
    predictions = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:].to(logits.device)
    # flat, so that the softmax runs along contiguous memory: several times as fast as over (batch, vocab, seq)
    per_token = F.cross_entropy(
        predictions.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return per_token.view_as(targets)


def linear_causal_lm_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """``causal_lm_loss`` of ``hidden_states @ weight.T + bias``, without ever holding all of these logits.

    The logits are made for the labelled tokens alone, ``ROWS_AT_ONCE`` at a time. Torch's chunked
    ``linear_cross_entropy`` makes their gradients in the forward, so that ``backward`` can run once; where torch
    lacks it, the logits of each chunk are computed a second time in the backward.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``, the input of the language-modelling head.
        weight: ``(vocab, hidden_size)``, the head's.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        bias: ``(vocab,)``.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.
        num_items: Labelled tokens to divide by.

    Returns:
        A float32 scalar (float64 for float64 weights), in nats per token.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    labelled = targets != IGNORE_INDEX
    hidden, targets = hidden_states[:, :-1][labelled].to(weight.dtype), targets[labelled]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # cut here as well, and summed in float32: torch rounds each sum to the dtype of the weight
    chunks = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    chunk_loss = _recomputed_cross_entropy if _Options is None else _fused_cross_entropy
    total = torch.stack([chunk_loss(rows, weight, wanted, bias).to(dtype) for rows, wanted in chunks]).sum()
    if label_smoothing:
        # Smoothing swaps a share of the target's logit for the mean logit, and both are linear in the hidden state.
        gap = (hidden * (weight[targets] - weight.mean(dim=0))).sum(dtype=dtype)
        if bias is not None:
            gap = gap + (bias[targets] - bias.mean()).sum(dtype=dtype)
        total = total + label_smoothing * gap
    return total / _count(labelled, num_items)


def _fused_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the summed cross-entropy of one chunk by torch's own kernel."""
    assert _Options is not None
    options = _Options(batch_chunk_size=ROWS_AT_ONCE, chunking_method=None)
    return F.linear_cross_entropy(rows, weight, targets, linear_bias=bias, reduction="sum", options=options)


def _recomputed_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the summed cross-entropy of one chunk, whose logits live only during the forward and the backward."""
    return checkpoint(  # type: ignore[no-any-return]
        _cross_entropy_sum, rows, weight, targets, bias, use_reentrant=False, preserve_rng_state=False
    )


def _cross_entropy_sum(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the summed cross-entropy of ``rows @ weight.T + bias``, in float32 at least."""
    logits = F.linear(rows, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def without_padding(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels without those that padding would predict: the first real token after padding on the left.

    Args:
        labels: ``(batch, seq)``, not shifted.
        mask: ``(batch, seq)``, nonzero for real tokens.

    Returns:
        A copy of the labels, ``IGNORE_INDEX`` at padding and right after it.
    """
    real = mask.to(labels.device).bool()
    after_real = torch.cat([real[:, :1], real[:, :-1]], dim=1)
    return labels.masked_fill(~(real & after_real), IGNORE_INDEX)


def expert_load(router_logits: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """Real tokens that would choose each expert, times ``1 / top_k``: ``(num_gates, num_experts)``.

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``, with the selection bias added where there is one;
            -inf for an expert that a gate does not have.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        top_k: Experts that each token chooses.

    Returns:
        Counts in the logits' dtype, float32 at least, whose rows sum to the number of real tokens. Counts of the
        parts of a batch add up.
    """
    num_experts = router_logits.shape[-1]
    k = min(top_k, num_experts)
    chosen = router_logits.detach().topk(k, dim=-1).indices
    counts = F.one_hot(chosen, num_experts).sum(dim=-2) * available(router_logits)[:, None, None]
    counts = counts / counts.sum(dim=-1, keepdim=True)
    return (counts * _real(router_logits, mask)).sum(dim=(1, 2))


def load_balance_loss(
    router_logits: Tensor,
    mask: Tensor | None,
    top_k: int,
    *,
    load: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """``E * sum_e f_e * P_e`` over real tokens, averaged over the gates; 1.0 when routing is uniform.

    ``f_e`` is the share of tokens that choose expert e and ``P_e`` its mean softmax probability (GShard, Lepikhin
    et al. 2020; Switch Transformers, Fedus et al. 2021, equation 4). The gradient flows through ``P`` alone.

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``; -inf for an expert that a gate does not have, which is
            then not counted in E.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        top_k: Experts that each token chooses.
        load: ``f`` from a larger batch, ``(num_gates, num_experts)`` in any positive scale; this batch's own by
            default. A fixed ``f`` makes the loss additive over micro-batches, and balancing over a larger batch
            leaves experts room to specialise (Qiu et al. 2025, "Demons in the Detail").
        num_tokens: Real tokens to divide by.

    Returns:
        A scalar.
    """
    if load is None:
        load = expert_load(router_logits, mask, top_k)
    fraction = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    real = _real(router_logits, mask)
    probability = (router_logits.softmax(dim=-1) * real).sum(dim=(1, 2)) / _count(real, num_tokens)
    num_experts = available(router_logits).sum(dim=-1)
    return (num_experts * (fraction * probability).sum(dim=-1)).mean()


def router_z_loss(router_logits: Tensor, mask: Tensor | None, *, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits over real tokens (ST-MoE, Zoph et al. 2022, equation 5).

    Args:
        router_logits: ``(num_gates, batch, seq, num_experts)``.
        mask: ``(batch, seq)``, nonzero for real tokens; None if all are.
        num_tokens: Real tokens to divide by.

    Returns:
        A scalar, averaged over the gates.
    """
    real = _real(router_logits, mask)
    squared = router_logits.logsumexp(dim=-1, keepdim=True).square()
    return ((squared * real).sum(dim=(1, 2, 3)) / _count(real, num_tokens)).mean()


def updated_selection_bias(bias: Tensor, load: Tensor, rate: float = 1e-3, among: Tensor | None = None) -> Tensor:
    """One step of auxiliary-loss-free balancing (DeepSeek-V3, 2024, section 2.1.2).

    Args:
        bias: ``(num_gates, num_experts)``, the router's ``selection_bias``.
        load: ``(num_gates, num_experts)``, tokens that chose each expert since the last step.
        rate: Size of the step.
        among: ``(num_gates, num_experts)``, which experts each gate has; all by default. The bias of the others stays.

    Returns:
        The new bias: raised by ``rate`` where an expert was chosen less than its fair share, lowered where more.
    """
    among = torch.ones_like(load) if among is None else among.to(load)
    fair = load.sum(dim=-1, keepdim=True) / among.sum(dim=-1, keepdim=True)
    return bias + rate * torch.sign(fair - load) * among


def available(router_logits: Tensor) -> Tensor:
    """Which experts each gate has, ``(num_gates, num_experts)`` of bool: those whose logits are not -inf."""
    return router_logits[:, 0, 0] != -torch.inf


def _real(router_logits: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as ``(1, batch, seq, 1)`` in the logits' dtype."""
    if mask is None:
        mask = router_logits.new_ones(router_logits.shape[1:3])
    return mask.to(router_logits)[None, :, :, None]


def _count(mask: Tensor, given: Tensor | int | None) -> Tensor | int:
    # A batch without a single counted token has the loss 0, not 0/0.
    return given if given is not None else mask.sum().clamp(min=1)
