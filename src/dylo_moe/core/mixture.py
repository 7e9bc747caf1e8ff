"""The mixture's arithmetic: ``sum_e w[t, e] * s_e * B_e A_e x_t``, by whichever product is the cheapest.

==========  ===================================================================  =============================
path        what it computes                                                     when
==========  ===================================================================  =============================
dense       all experts: one matmul down, the weights in rank space, one up      the default; the only one with
                                                                                 gradients
one token   the chosen experts, one after the other                              sparse routing, one token on a
                                                                                 CPU (decoding)
grouped     the chosen experts: token choices sorted by expert, one grouped      sparse routing, many experts,
            product down and one up                                              many tokens
gathered    the chosen experts' own matrices for each token choice               sparse routing, many experts,
                                                                                 few tokens (decoding)
==========  ===================================================================  =============================

Tensors in, tensors out; which layers there are and where their weights come from is ``routed_lora``'s affair.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SPARSE_FROM = 6
"""Experts per chosen expert from which only the chosen ones are computed."""


class TokenWeights:
    """The routing weights of some tokens, and what the layers derive from them, each made once.

    Attributes:
        weights: ``(batch, seq, num_experts)``; batch and seq may be 1 for weights that serve all.
        chosen: ``(batch, seq, top_k)``, indices of the only experts with a weight above 0; None for dense routing.
    """

    def __init__(self, weights: Tensor, chosen: Tensor | None = None) -> None:
        self.weights = weights
        self.chosen = chosen
        self._made: dict[Hashable, Any] = {}

    def on(self, device: torch.device) -> "TokenWeights":
        """Return them on another device."""
        return self._once(("on", device), lambda: self._changed(lambda part: part.to(device)))  # type: ignore[no-any-return]

    def in_one_row(self, tokens: int) -> "TokenWeights":
        """Return them for a layer that sees the tokens of all rows as one row of ``tokens``."""
        rows, length = self.weights.shape[:2]
        if rows == 1 and length in (1, tokens):
            return self
        if length == 1:
            length = tokens // rows
        elif rows == 1:
            rows = tokens // length
        if rows * length != tokens:
            return self  # they do not fit, which the layer says
        return self._once(  # type: ignore[no-any-return]
            ("row", tokens),
            lambda: self._changed(lambda part: part.expand(rows, length, -1).reshape(1, tokens, -1)),
        )

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "TokenWeights":
        return TokenWeights(change(self.weights), None if self.chosen is None else change(self.chosen))

    def of(self, experts: tuple[int, ...]) -> "TokenWeights":
        """The weights of some of the experts, as dense ones."""
        return self._once(("of", experts), lambda: TokenWeights(self.weights[..., list(experts)]))  # type: ignore[no-any-return]

    def per_rank(self, ranks: tuple[int, ...], scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """``(batch, seq, sum of ranks)``: each expert's weight times its scaling, on each of its ranks."""
        return self._once(("per rank", ranks, scalings, dtype), partial(self._spread, ranks, scalings, dtype))  # type: ignore[no-any-return]

    def _spread(self, ranks: tuple[int, ...], scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        weights = self.weights.to(dtype)
        if len({*zip(ranks, scalings, strict=True)}) == 1:
            return (weights * scalings[0]).unsqueeze(-1).expand(*weights.shape, ranks[0]).flatten(-2)
        columns = zip(weights.unbind(-1), ranks, scalings, strict=True)
        return torch.cat([(column * s).unsqueeze(-1).expand(*column.shape, r) for column, r, s in columns], dim=-1)

    def of_choices(self, scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """``(tokens, top_k)``: weight times scaling of each chosen expert."""
        return self._once(("of choices", scalings, dtype), partial(self._of_choices, scalings, dtype))  # type: ignore[no-any-return]

    def _of_choices(self, scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        assert self.chosen is not None
        scaled = self.weights.to(dtype) * self.weights.new_tensor(scalings, dtype=dtype)
        return scaled.gather(-1, self.chosen).flatten(0, 1)

    def of_one_token(self) -> list[tuple[int, float]] | None:
        """The chosen experts with their weights, for one token on a CPU; None for more, or where asking would wait."""
        if self.chosen is None or self.chosen.shape[:-1] != (1, 1) or torch.compiler.is_compiling():
            return None
        return self._once("one token", self._of_one_token) if self.chosen.device.type == "cpu" else None

    def _of_one_token(self) -> list[tuple[int, float]]:
        assert self.chosen is not None
        return [(expert, float(self.weights[0, 0, expert])) for expert in self.chosen.flatten().tolist()]

    def by_expert(self) -> "ByExpert":
        """The choices of all tokens, sorted by expert."""
        return self._once("by expert", self._sorted)  # type: ignore[no-any-return]

    def _sorted(self) -> "ByExpert":
        assert self.chosen is not None
        choices = self.chosen.flatten()
        order = choices.argsort(stable=True)
        counts = choices.new_zeros(self.weights.shape[-1]).scatter_add(0, choices, torch.ones_like(choices))
        ends = counts.cumsum(0).to(torch.int32)
        return ByExpert(order // self.chosen.shape[-1], order, order.argsort(), ends)

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
        return made


@cache
def one_expert(expert: int, num_experts: int) -> TokenWeights:
    """The weights of one token, on a CPU, that goes to one expert."""
    weights = torch.zeros(1, 1, num_experts)
    weights[..., expert] = 1
    return TokenWeights(weights, torch.tensor([[[expert]]]))


class ByExpert(NamedTuple):
    """Token choices sorted by expert; a choice is one token's one chosen expert.

    Attributes:
        token: ``(choices,)``, the token of each sorted choice.
        order: ``(choices,)``, where each sorted choice stood before.
        inverse: ``(choices,)``, where each choice stands now.
        ends: ``(num_experts,)``, int32: where each expert's choices end.
    """

    token: Tensor
    order: Tensor
    inverse: Tensor
    ends: Tensor


def routed_delta(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    routing_weights: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mixture of some experts by the dense path, for any number of experts.

    Args:
        x: ``(..., in_features)``.
        lora_a: A matrix ``(rank_e, in_features)`` for each expert; ranks may differ.
        lora_b: A matrix ``(out_features, rank_e)`` for each expert.
        scalings: The factor ``s_e`` of each expert.
        routing_weights: ``(..., num_experts)``, broadcastable to the leading dimensions of ``x``.
        dropout: Applied to ``x`` once; the experts share the mask.

    Returns:
        ``(..., out_features)`` in the dtype of ``x``.
    """
    rank_space = F.linear(x if dropout is None else dropout(x), torch.cat(list(lora_a)))
    ranks = tuple(a.shape[0] for a in lora_a)
    per_rank = TokenWeights(routing_weights).per_rank(ranks, tuple(scalings), rank_space.dtype)
    return F.linear(rank_space * per_rank, torch.cat(list(lora_b), dim=1))


def add_product(
    result: Tensor, rank_space: Tensor, up: Tensor, *, scale: float = 1.0, in_place: bool = False
) -> Tensor:
    """``result + scale * rank_space @ up.T``, in one pass over the result where the types allow it.

    Args:
        result: ``(..., out_features)``.
        rank_space: ``(..., ranks)``.
        up: ``(out_features, ranks)``.
        scale: Factor of the product.
        in_place: Whether the result may be overwritten; nothing may need its values to compute a gradient.

    Returns:
        ``(..., out_features)`` in the dtype of ``result``.
    """
    if result.dtype != rank_space.dtype or result.dtype != up.dtype:
        return (result + F.linear(rank_space, up) * scale).to(result.dtype)
    if in_place and not torch.is_grad_enabled():
        result.flatten(0, -2).addmm_(rank_space.flatten(0, -2), up.t(), alpha=scale)
        return result
    if in_place and scale == 1.0 and not torch.compiler.is_compiling() and not result._is_view():
        return _AddInPlace.apply(result, rank_space, up)  # type: ignore[no-any-return, no-untyped-call]
    rows = torch.addmm(result.flatten(0, -2), rank_space.flatten(0, -2), up.t(), alpha=scale)
    return rows.view_as(result)


class _AddInPlace(torch.autograd.Function):
    """``result += rank_space @ up.T``. Autograd's own, on a view of the result, copies its gradient twice."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, rank_space: Tensor, up: Tensor) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(rank_space, up)
        result.flatten(0, -2).addmm_(rank_space.flatten(0, -2), up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rank_space, up = ctx.saved_tensors
        _, wants_rank_space, wants_up = ctx.needs_input_grad
        for_rank_space = gradient @ up if wants_rank_space else None
        for_up = gradient.flatten(0, -2).t() @ rank_space.flatten(0, -2) if wants_up else None
        return gradient, for_rank_space, for_up


def add_of_one_token(
    result: Tensor, x: Tensor, down: Tensor, up: Tensor, *, scale: float, in_place: bool = False
) -> Tensor:
    """``result + scale * B A x`` for one token and one expert, without gradients.

    Args:
        result: ``(1, 1, out_features)``.
        x: ``(1, 1, in_features)``.
        down: ``A``, ``(rank, in_features)``.
        up: ``B``, ``(out_features, rank)``.
        scale: Weight times scaling.
        in_place: Whether the result may be overwritten.
    """
    if not in_place or result.dtype != up.dtype:
        return add_product(result, F.linear(x, down), up, scale=scale, in_place=in_place)
    # products with a vector: fewer operators than with a matrix of one row, and there is little else to do
    result.view(-1).addmv_(up, torch.mv(down, x.reshape(-1)), alpha=scale)
    return result


def pays_sparse(num_experts: int, top_k: int) -> bool:
    """Whether the chosen experts alone cost less than all of them in one product."""
    return num_experts > SPARSE_FROM * top_k


def has_sparse_product(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], routing: TokenWeights) -> bool:
    """Whether a kernel computes the chosen experts alone, for matrices of these shapes and types.

    ``grouped_mm`` takes no float64, only rows of whole 16 bytes, and only bfloat16 when compiled. Torch 2.9 lacks it.
    """
    if _are_few(routing):
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
    x: Tensor, lora_a: Sequence[Tensor], scalings: tuple[float, ...], routing: TokenWeights, layers: int = 1
) -> Tensor:
    """Into rank space by the chosen experts alone, for one layer or several that are fed the same; no gradients.

    Args:
        x: ``(batch, seq, in_features)``.
        lora_a: A matrix ``(rank_e, in_features)`` for each layer of each expert: all of the first expert's, then all
            of the second's.
        scalings: The factor ``s_e`` of each expert.
        routing: Weights with ``chosen``, of the same batch and seq as ``x``.
        layers: How many layers there are.

    Returns:
        ``(tokens * top_k, layers, largest rank)``, times weight and scaling, in the order that ``sparse_up`` takes.
    """
    assert routing.chosen is not None
    tokens, weights = x.flatten(0, -2), routing.of_choices(scalings, x.dtype)
    down = _of_one_rank(lora_a).view(len(scalings), -1, x.shape[-1])
    if _are_few(routing):
        rank_space = torch.matmul(down[routing.chosen.flatten(0, -2)], tokens[:, None, :, None])
        weight = weights.flatten()
    else:
        choices = routing.by_expert()
        rank_space = F.grouped_mm(tokens[choices.token], down.transpose(1, 2), offs=choices.ends)
        weight = weights.flatten()[choices.order]
    return rank_space.view(len(weight), layers, -1) * weight.view(-1, 1, 1)


def sparse_up(rank_space: Tensor, lora_b: Sequence[Tensor], routing: TokenWeights) -> Tensor:
    """Back from rank space by the chosen experts alone, for one layer.

    Args:
        rank_space: ``(tokens * top_k, largest rank)``, a layer's part of what ``sparse_down`` gave.
        lora_b: A matrix ``(out_features, rank_e)`` for each expert.
        routing: As for ``sparse_down``.

    Returns:
        ``(tokens, out_features)``.
    """
    assert routing.chosen is not None
    if len({b.shape[1] for b in lora_b}) == 1:
        up = side_by_side(lora_b).transpose(1, 2)
    else:
        up = _of_one_rank([b.t() for b in lora_b])
    if _are_few(routing):
        chosen = up[routing.chosen.flatten(0, -2)].flatten(1, 2)
        return torch.bmm(rank_space.reshape(len(chosen), 1, -1), chosen).squeeze(1)
    choices = routing.by_expert()
    mixed = F.grouped_mm(rank_space.contiguous(), up, offs=choices.ends)
    # put back and summed, not added at an index: the order of that sum would not be the same on every run on a GPU
    return mixed[choices.inverse].view(-1, routing.chosen.shape[-1], mixed.shape[-1]).sum(dim=1)


def _are_few(routing: TokenWeights) -> bool:
    """Whether there are fewer choices than experts, so that most experts have nothing to do."""
    assert routing.chosen is not None
    return routing.chosen.numel() < routing.weights.shape[-1]


def _of_one_rank(weights: Sequence[Tensor]) -> Tensor:
    """``(n, largest rank, features)`` of matrices ``(rank, features)``; ranks that are missing add nothing."""
    if len({weight.shape[0] for weight in weights}) == 1:
        return side_by_side(weights)
    return pad_sequence(list(weights), batch_first=True)


def stack_rows(weights: Sequence[Tensor]) -> Tensor:
    """``(sum of rows, columns)``: the weights under each other; without a copy where no gradient is wanted."""
    if torch.is_grad_enabled() or len({weight.shape for weight in weights}) > 1:
        return torch.cat(list(weights))
    return side_by_side(weights).flatten(0, 1)


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """``(n, ...)``: weights of equal shape as one tensor, without a copy from the second call on.

    The first call moves the weights to consecutive memory, as ``torch.nn.RNN.flatten_parameters`` does, and the
    stack is a view of that: it can never be stale, and nothing takes room twice. Weights that share their memory
    with anything else are left where they are, and copied in each call.
    """
    # addresses are not the compiler's business, and FSDP frees and refills what it gathers
    if torch.compiler.is_compiling() or (dist.is_available() and dist.is_initialized()):
        return torch.stack(list(weights))
    first, last = weights[0], weights[-1]
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    consecutive = all(weight.data_ptr() == start + index * size for index, weight in enumerate(weights))
    if consecutive and first.is_contiguous() and _memory(first) == _memory(last):
        return first.detach().as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))
    # outside inference mode: a tensor made in it could not be trained later
    with torch.inference_mode(False), torch.no_grad():
        stack = torch.stack([weight.detach() for weight in weights])
        # they fill the memory they lie in, so that nothing else can be in it; and no other process looks at it
        fill = sum(dict(map(_memory, weights)).values()) == len(weights) * size
        if fill and not (first.device.type == "cpu" and any(weight.is_shared() for weight in weights)):
            for weight, row in zip(weights, stack, strict=True):
                weight.data = row
    return stack


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of the memory block that a tensor lies in."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
