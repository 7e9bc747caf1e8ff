"""The language-modelling loss as pure functions: tensors in, tensor out; ``balance`` has the router's losses.

Each token's share of a loss is additive. Divided by a count over the whole global batch (``num_items``), the parts of
an accumulated or distributed batch therefore add up to exactly the loss of one large batch. Without a count, each
function divides by its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
ROWS_AT_ONCE = 256
"""Number of tokens whose logits ``linear_causal_lm_loss`` holds at a time: few, but enough for a fast product."""

_Options = getattr(nn, "LinearCrossEntropyOptions", None)
"""Options of torch's chunked loss; None before torch 2.13, which does not have it."""


def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, num_items: Tensor | int | None = None
) -> Tensor:
    """Return the mean cross-entropy of the labelled tokens, each given the tokens before it.

    Args:
        logits: ``(batch, seq, vocab)``.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.
        num_items: Number of labelled tokens to divide by.

    Returns:
        A float32 scalar (float64 for float64 logits), in nats per token.
    """
    per_token = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return per_token.sum() / _count(labels[:, 1:] != IGNORE_INDEX, num_items)


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each token given the tokens before it, 0 where there is no label.

    Args:
        logits: ``(batch, seq, vocab)``.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.

    Returns:
        ``(batch, seq - 1)`` in float32 (float64 for float64 logits), in nats.
    """
    predictions = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:].to(logits.device)
    # flat: a softmax along contiguous memory is several times as fast as over (batch, vocab, seq)
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
    """Return ``causal_lm_loss`` of ``hidden_states @ weight.T + bias``, without holding all of these logits.

    The logits are computed for the labelled tokens alone, ``ROWS_AT_ONCE`` at a time. Torch's chunked
    ``linear_cross_entropy`` computes their gradients in the forward, so that ``backward`` can run once. Where torch
    does not have it, the backward computes the logits of each chunk again.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``, the input of the language-modelling head.
        weight: Weight of the head, ``(vocab, hidden_size)``.
        labels: ``(batch, seq)``, not shifted; ``IGNORE_INDEX`` carries no loss.
        bias: ``(vocab,)``.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.
        num_items: Number of labelled tokens to divide by.

    Returns:
        A float32 scalar (float64 for float64 weights), in nats per token.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    labelled = targets != IGNORE_INDEX
    hidden, targets = hidden_states[:, :-1][labelled].to(weight.dtype), targets[labelled]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # summed here in float32: torch rounds each sum to the dtype of the weight
    chunks = zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    chunk_loss = _recomputed_cross_entropy if _Options is None else _fused_cross_entropy
    total = torch.stack([chunk_loss(rows, weight, wanted, bias).to(dtype) for rows, wanted in chunks]).sum()
    if label_smoothing:
        # smoothing swaps a share of the target's logit for the mean logit; both are linear in the hidden state
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
    loss: Tensor = checkpoint(
        _cross_entropy_sum, rows, weight, targets, bias, use_reentrant=False, preserve_rng_state=False
    )
    return loss


def _cross_entropy_sum(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the summed cross-entropy of ``rows @ weight.T + bias``, in float32 at least."""
    logits = F.linear(rows, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def without_padding(labels: Tensor, mask: Tensor) -> Tensor:
    """Return labels without those that padding would predict: the first real token after padding on the left.

    Args:
        labels: ``(batch, seq)``, not shifted.
        mask: ``(batch, seq)``, nonzero for real tokens.

    Returns:
        A copy of the labels, with ``IGNORE_INDEX`` at padding and right after it.
    """
    real = mask.to(labels.device).bool()
    after_real = torch.cat([real[:, :1], real[:, :-1]], dim=1)
    return labels.masked_fill(~(real & after_real), IGNORE_INDEX)


def _count(mask: Tensor, given: Tensor | int | None) -> Tensor | int:
    # clamped: a batch without labelled tokens has the loss 0, not 0/0
    return given if given is not None else mask.sum().clamp(min=1)
