"""The mixture's products: ``sum_e w[t, e] * s_e * B_e A_e x_t``, by whichever is cheapest.

============  ============================================================  ========================================
path          computes                                                      used for
============  ============================================================  ========================================
dense         all experts: one matmul down, the weights in rank space, one  everything else; the only path with
              matmul up                                                     gradients
single token  the top-k experts, one after the other                        sparse routing of one token on a CPU
grouped       the top-k experts: token choices sorted by expert, one        sparse routing, many experts, many tokens
              grouped matmul down and one up
gathered      the top-k experts' own matrices for each token choice         sparse routing, many experts, few tokens
============  ============================================================  ========================================

Tensors in, tensors out: ``layer_mixer`` chooses the path and passes the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dylo_moe.core.lora.stacking import stacked_view
from dylo_moe.core.lora.token_weights import TokenWeights

_SPARSE_FROM = 6
"""Number of experts per top-k expert from which only the top-k experts are computed."""


def dense_lora_delta(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    routing_weights: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the mixture of all experts by the dense path.

    Args:
        x: ``(..., in_features)``.
        lora_a: Matrix ``(rank_e, in_features)`` of each expert; ranks may differ.
        lora_b: Matrix ``(out_features, rank_e)`` of each expert.
        scalings: Factor ``s_e`` of each expert.
        routing_weights: ``(..., num_experts)``, broadcastable to the leading dimensions of ``x``.
        dropout: Applied to ``x`` once, so that the experts share one mask.

    Returns:
        ``(..., out_features)`` in the dtype of ``x``.
    """
    rank_space = F.linear(x if dropout is None else dropout(x), torch.cat(list(lora_a)))
    ranks = tuple(a.shape[0] for a in lora_a)
    per_rank = TokenWeights(routing_weights).per_rank(ranks, tuple(scalings), rank_space.dtype)
    return F.linear(rank_space * per_rank, torch.cat(list(lora_b), dim=1))


def addmm_lora(result: Tensor, rank_space: Tensor, up: Tensor, *, scale: float = 1.0, in_place: bool = False) -> Tensor:
    """Return ``result + scale * rank_space @ up.T``, in one pass over the result where the dtypes are equal.

    Args:
        result: ``(..., out_features)``.
        rank_space: ``(..., ranks)``.
        up: ``(out_features, ranks)``.
        scale: Factor of the product.
        in_place: Whether ``result`` may be overwritten; no gradient may need its values.

    Returns:
        ``(..., out_features)`` in the dtype of ``result``.
    """
    if result.dtype != rank_space.dtype or result.dtype != up.dtype:
        return (result + F.linear(rank_space, up) * scale).to(result.dtype)
    if in_place and not torch.is_grad_enabled():
        result.flatten(0, -2).addmm_(rank_space.flatten(0, -2), up.t(), alpha=scale)
        return result
    if in_place and scale == 1.0 and not torch.compiler.is_compiling() and not result._is_view():
        added: Tensor = _AddInPlace.apply(result, rank_space, up)  # type: ignore[no-untyped-call]
        return added
    rows = torch.addmm(result.flatten(0, -2), rank_space.flatten(0, -2), up.t(), alpha=scale)
    return rows.view_as(result)


class _AddInPlace(torch.autograd.Function):
    """``result += rank_space @ up.T``. Plain autograd, on a view of the result, would copy its gradient twice."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, rank_space: Tensor, up: Tensor) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(rank_space, up)
        result.flatten(0, -2).addmm_(rank_space.flatten(0, -2), up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rank_space, up = ctx.saved_tensors
        _, needs_rank_space, needs_up = ctx.needs_input_grad
        rank_space_gradient = gradient @ up if needs_rank_space else None
        up_gradient = gradient.flatten(0, -2).t() @ rank_space.flatten(0, -2) if needs_up else None
        return gradient, rank_space_gradient, up_gradient


def add_lora_single_token(
    result: Tensor, x: Tensor, down: Tensor, up: Tensor, *, scale: float, in_place: bool = False
) -> Tensor:
    """Return ``result + scale * B A x`` for one token and one expert, without gradients.

    Args:
        result: ``(1, 1, out_features)``.
        x: ``(1, 1, in_features)``.
        down: ``A``, ``(rank, in_features)``.
        up: ``B``, ``(out_features, rank)``.
        scale: Routing weight times scaling.
        in_place: Whether ``result`` may be overwritten.
    """
    if not in_place or result.dtype != up.dtype:
        return addmm_lora(result, F.linear(x, down), up, scale=scale, in_place=in_place)
    # matrix-vector products launch fewer operators than matrices of one row
    result.view(-1).addmv_(up, torch.mv(down, x.reshape(-1)), alpha=scale)
    return result


def prefer_sparse(num_experts: int, top_k: int) -> bool:
    """Return whether the top-k experts alone cost less than all experts in one product."""
    return num_experts > _SPARSE_FROM * top_k


def has_sparse_kernel(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], weights: TokenWeights) -> bool:
    """Return whether the top-k experts alone can be computed for matrices of these shapes and dtypes.

    ``grouped_mm`` does not take float64, needs rows of a multiple of 16 bytes and, when compiled, bfloat16. Torch 2.9
    does not have it.
    """
    if _fewer_choices_than_experts(weights):
        return True
    if not hasattr(F, "grouped_mm"):
        return False
    first = lora_a[0]
    if torch.compiler.is_compiling() and first.dtype != torch.bfloat16:
        return False
    widths = (first.shape[1], lora_b[0].shape[0], *{a.shape[0] for a in lora_a})
    aligned = all(width * first.element_size() % 16 == 0 for width in widths)
    return aligned and first.dtype in (torch.float32, torch.bfloat16, torch.float16)


def sparse_down(
    x: Tensor, lora_a: Sequence[Tensor], scalings: tuple[float, ...], weights: TokenWeights, num_layers: int = 1
) -> Tensor:
    """Project into rank space by the top-k experts alone, for one layer or several with the same input; no gradients.

    Args:
        x: ``(batch, seq, in_features)``.
        lora_a: Matrix ``(rank_e, in_features)`` of each layer and expert: those of the first expert for all layers,
            then those of the second, and so on.
        scalings: Factor ``s_e`` of each expert.
        weights: Sparse weights of the same batch and seq as ``x``.
        num_layers: Number of layers.

    Returns:
        ``(tokens * top_k, num_layers, largest rank)``, times weight and scaling, in the order that ``sparse_up`` takes.
    """
    assert weights.topk_expert_ids is not None
    tokens, topk_weights = x.flatten(0, -2), weights.topk_weights(scalings, x.dtype).flatten()
    down = _stack_padded(lora_a).view(len(scalings), -1, x.shape[-1])
    if _fewer_choices_than_experts(weights):
        rank_space = torch.matmul(down[weights.topk_expert_ids.flatten(0, -2)], tokens[:, None, :, None])
    else:
        dispatch = weights.sort_by_expert()
        rank_space = F.grouped_mm(tokens[dispatch.token], down.transpose(1, 2), offs=dispatch.ends)
        topk_weights = topk_weights[dispatch.order]
    return rank_space.view(len(topk_weights), num_layers, -1) * topk_weights.view(-1, 1, 1)


def sparse_up(rank_space: Tensor, lora_b: Sequence[Tensor], weights: TokenWeights) -> Tensor:
    """Project back from rank space by the top-k experts alone, for one layer.

    Args:
        rank_space: ``(tokens * top_k, largest rank)``, one layer's part of the output of ``sparse_down``.
        lora_b: Matrix ``(out_features, rank_e)`` of each expert.
        weights: Weights that ``sparse_down`` was given.

    Returns:
        ``(tokens, out_features)``.
    """
    ids = weights.topk_expert_ids
    assert ids is not None
    if len({b.shape[1] for b in lora_b}) == 1:
        up = stacked_view(lora_b).transpose(1, 2)
    else:
        up = _stack_padded([b.t() for b in lora_b])
    if _fewer_choices_than_experts(weights):
        topk_up = up[ids.flatten(0, -2)].flatten(1, 2)
        return torch.bmm(rank_space.reshape(len(topk_up), 1, -1), topk_up).squeeze(1)
    dispatch = weights.sort_by_expert()
    mixed = F.grouped_mm(rank_space.contiguous(), up, offs=dispatch.ends)
    # unsorted and summed: the order of an index_add would differ between runs on a GPU
    return mixed[dispatch.inverse].view(-1, ids.shape[-1], mixed.shape[-1]).sum(dim=1)


def _fewer_choices_than_experts(weights: TokenWeights) -> bool:
    """Return whether there are fewer token choices than experts, so that most experts have no token."""
    assert weights.topk_expert_ids is not None
    return weights.topk_expert_ids.numel() < weights.weights.shape[-1]


def _stack_padded(weights: Sequence[Tensor]) -> Tensor:
    """Stack matrices ``(rank, features)`` to ``(n, largest rank, features)``, padded with zeros."""
    if len({weight.shape[0] for weight in weights}) == 1:
        return stacked_view(weights)
    return pad_sequence(list(weights), batch_first=True)
