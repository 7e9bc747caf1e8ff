"""The routing weights of some tokens, and what the LoRA layers derive from them: tensors in, tensors out."""

from collections.abc import Callable, Hashable
from functools import cache, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


class ExpertDispatch(NamedTuple):
    """Token choices sorted by expert. A choice is one token with one of its top-k experts.

    Attributes:
        token: ``(choices,)``, token of each sorted choice.
        order: ``(choices,)``, place of each sorted choice before sorting.
        inverse: ``(choices,)``, place of each choice after sorting.
        ends: ``(num_experts,)``, int32, end of each expert's choices.
    """

    token: Tensor
    order: Tensor
    inverse: Tensor
    ends: Tensor


def _once(method: Callable[Concatenate["TokenWeights", P], T]) -> Callable[Concatenate["TokenWeights", P], T]:
    """Let a method of ``TokenWeights`` compute its result once for the same arguments."""

    @wraps(method)
    def kept(self: "TokenWeights", /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = method, args, *kwargs.items()
        value: T | None = self.derived.get(key)
        if value is None:
            value = self.derived[key] = method(self, *args, **kwargs)
        return value

    return kept


class TokenWeights:
    """Routing weights of some tokens. What is derived from them is computed once and kept.

    Attributes:
        weights: ``(batch, seq, num_experts)``; batch and seq may be 1 to serve all rows or tokens.
        topk_expert_ids: ``(batch, seq, top_k)``, the only experts with a weight above 0; None for dense routing.
        derived: What was computed from them, by method and arguments.
    """

    def __init__(self, weights: Tensor, topk_expert_ids: Tensor | None = None) -> None:
        self.weights = weights
        self.topk_expert_ids = topk_expert_ids
        self.derived: dict[Hashable, Any] = {}

    @_once
    def to(self, device: torch.device) -> "TokenWeights":
        """Return the weights on another device."""
        return self._map(lambda part: part.to(device))

    def as_one_row(self, tokens: int) -> "TokenWeights":
        """Return the weights for a layer that sees all rows as one row of ``tokens``; unchanged if they do not fit."""
        rows, length = self.weights.shape[:2]
        if rows == 1 and length in (1, tokens):
            return self
        if length == 1:
            length = tokens // rows
        elif rows == 1:
            rows = tokens // length
        if rows * length != tokens:
            return self
        return self._flatten_rows(rows, length)

    @_once
    def _flatten_rows(self, rows: int, length: int) -> "TokenWeights":
        return self._map(lambda part: part.expand(rows, length, -1).reshape(1, rows * length, -1))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TokenWeights":
        ids = self.topk_expert_ids
        return TokenWeights(function(self.weights), None if ids is None else function(ids))

    def with_shared_expert(self) -> "TokenWeights":
        """Return the weights with one more column, for an expert that every token has at weight 1."""
        weights, ids = self.weights, self.topk_expert_ids
        if ids is not None:
            ids = torch.cat([ids, ids.new_full((*ids.shape[:-1], 1), weights.shape[-1])], dim=-1)
        return TokenWeights(F.pad(weights, (0, 1), value=1.0), ids)

    @_once
    def select_experts(self, columns: tuple[int, ...]) -> "TokenWeights":
        """Return the weights of some of the experts, as dense weights."""
        return TokenWeights(self.weights[..., list(columns)])

    @_once
    def per_rank(self, ranks: tuple[int, ...], scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """Return each expert's weight times its scaling, once for each of its ranks.

        Returns:
            ``(batch, seq, sum of ranks)`` in ``dtype``.
        """
        weights = self.weights.to(dtype)
        if len({*zip(ranks, scalings, strict=True)}) == 1:
            return (weights * scalings[0]).unsqueeze(-1).expand(*weights.shape, ranks[0]).flatten(-2)
        columns = zip(weights.unbind(-1), ranks, scalings, strict=True)
        return torch.cat([(column * s).unsqueeze(-1).expand(*column.shape, r) for column, r, s in columns], dim=-1)

    @_once
    def topk_weights(self, scalings: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """Return weight times scaling of each token's top-k experts, ``(tokens, top_k)`` in ``dtype``."""
        assert self.topk_expert_ids is not None
        scaled = self.weights.to(dtype) * self.weights.new_tensor(scalings, dtype=dtype)
        return scaled.gather(-1, self.topk_expert_ids).flatten(0, 1)

    @_once
    def single_token_topk(self) -> list[tuple[int, float]] | None:
        """Return the top-k experts of a single token with their weights, as Python numbers.

        None for dense routing or more tokens, under a compiler, and on a device that reading would have to wait for.
        """
        ids = self.topk_expert_ids
        if ids is None or ids.shape[:-1] != (1, 1) or torch.compiler.is_compiling():
            return None
        if ids.device.type != "cpu":
            return None
        return [(expert, float(self.weights[0, 0, expert])) for expert in ids.flatten().tolist()]

    @_once
    def sort_by_expert(self) -> ExpertDispatch:
        """Return the choices of all tokens, sorted by expert."""
        assert self.topk_expert_ids is not None
        choices = self.topk_expert_ids.flatten()
        order = choices.argsort(stable=True)
        counts = choices.new_zeros(self.weights.shape[-1]).scatter_add(0, choices, torch.ones_like(choices))
        ends = counts.cumsum(0).to(torch.int32)
        return ExpertDispatch(order // self.topk_expert_ids.shape[-1], order, order.argsort(), ends)


@cache
def one_hot_weights(expert: int, num_experts: int, shared: bool = False) -> TokenWeights:
    """Return the weights of one token, on a CPU, that goes to one expert, and to the shared one if there is one."""
    weights = torch.zeros(1, 1, num_experts)
    weights[..., expert] = 1
    one_hot = TokenWeights(weights, torch.tensor([[[expert]]]))
    return one_hot.with_shared_expert() if shared else one_hot
