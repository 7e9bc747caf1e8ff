"""The router: from hidden states to routing weights.

A linear gate on normalized hidden states, then a softmax over all experts (dense) or over the ``top_k`` best of them
(sparse). The router knows nothing about LoRA, layers, or where its input was read.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dylo_moe.core.base import in_place
from dylo_moe.errors import RoutingError

YOUNG, MATURE = 0, 1
SUM_TO_ONE, UNIT = "sum_to_one", "unit"

_SMALLEST_NORM = 1e-6


class RouterOutput(NamedTuple):
    """Output of a gate for each token.

    Attributes:
        weights: Routing weights, ``(batch, seq, num_routed_experts)``.
        logits: Logits of the weights, of the same shape.
        topk_expert_ids: ``(batch, seq, top_k)``, the experts with a weight above 0; None for dense routing.
    """

    weights: Tensor
    logits: Tensor
    topk_expert_ids: Tensor | None = None


class DynamicHybridRouter(nn.Module):
    """Router from each token to a mixture of experts: sparse when evaluating with mature experts only, else dense.

    Gates are kept and computed in float32 at least, whatever the model's dtype and autocast say: a softmax in
    bfloat16 loses small weights (Switch Transformers, Fedus et al. 2021, section 2.4, "selective precision").

    Args:
        hidden_size: Width of the hidden states.
        num_experts: Number of experts to begin with; at least 1.
        top_k: Experts per token when sparse; 1 to ``num_experts``.
        temperature: Divisor of the logits; above 0. Lower is sharper.
        num_gates: Number of independent gates, one for each place where a router input is read.
        experts_per_gate: Number of experts that each gate has, counted from the first; all by default. An expert that
            is added later belongs to every gate.
        expert_scale: ``sum_to_one``, or ``unit``: a token's weights sum to the number of experts that are mixed, so
            that equal weights add up the experts as one LoRA of all their ranks does.

    Attributes:
        maturity: 0 (young) or 1 (mature) for each expert.
        sparse_training: Whether training also mixes the ``top_k`` best experts alone.
        selection_bias: ``(num_gates, num_experts)``; see ``select_topk``.
        expert_load: ``(num_gates, num_experts)``, choices of the last global batch of a training run, from which a
            resumed run continues. Routing does not depend on it.

    Raises:
        RoutingError: A number is out of its range.
    """

    selection_bias: Tensor
    expert_load: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        temperature: float = 1.0,
        num_gates: int = 1,
        experts_per_gate: Sequence[int] | None = None,
        expert_scale: str = SUM_TO_ONE,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise RoutingError(f"`num_experts` must be at least 1, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise RoutingError(f"`top_k` must be from 1 to the number of experts ({num_experts}), got {top_k}")
        if not temperature > 0:
            raise RoutingError(f"`temperature` must be above 0, got {temperature}")
        if expert_scale not in (SUM_TO_ONE, UNIT):
            raise RoutingError(f"`expert_scale` must be {SUM_TO_ONE} or {UNIT}, got {expert_scale!r}")
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.temperature = temperature
        self.experts_per_gate = experts_per_gate
        self.expert_scale = expert_scale
        self.sparse_training = False
        self.maturity = [YOUNG] * num_experts
        # on RMS-normalized input of common widths, this spread gives logits of unit variance or less
        self.gates = nn.ParameterList(
            nn.Parameter(torch.randn(num_experts, hidden_size) * 0.02) for _ in range(num_gates)
        )
        self.register_buffer("selection_bias", torch.zeros(num_gates, num_experts))
        self.register_buffer("expert_load", torch.ones(num_gates, num_experts))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep gates and biases in float32 at least, also through ``.half()`` and ``.to(torch.bfloat16)``."""

        def apply_but_keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrow else moved

        super()._apply(apply_but_keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def num_experts(self) -> int:
        """Number of experts that the router can choose from."""
        return len(self.maturity)

    def is_sparse(self, experts: Sequence[int] | None = None) -> bool:
        """Return whether routing is sparse now: evaluating with mature experts only, or by ``sparse_training``."""
        if self.training:
            return self.sparse_training
        routed = self.maturity if experts is None else [self.maturity[expert] for expert in experts]
        return all(maturity == MATURE for maturity in routed)

    def forward(self, hidden_states: Tensor, gate: int = 0, experts: Sequence[int] | None = None) -> RouterOutput:
        """Compute routing weights for each token from that token's hidden state alone.

        Args:
            hidden_states: ``(batch, seq, hidden_size)``, any floating dtype.
            gate: Index of the gate.
            experts: Indices of the experts to route among; all of them by default. The others are not computed, so that
                leaving one out gives the same bits as never having had it.

        Returns:
            Weights and temperature-scaled logits, float32 (float64 for a float64 input), each
            ``(batch, seq, len(experts))``; each row of weights sums to 1, or as ``expert_scale`` says. Where the gate
            does not have an expert, the weight is 0 and the logit -inf.
        """
        with in_place(self.gates):
            weight, bias = self.gates[gate], self.selection_bias[gate]
        if experts is not None and len(experts) < self.num_experts:
            rows = list(experts)
            weight, bias = weight[rows], bias[rows]
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        with _without_autocast(hidden_states.device.type):
            logits = F.linear(hidden_states, weight.to(hidden_states)) * self._logit_scale(hidden_states)
        masked = self._masked_experts(gate, experts)
        if masked:
            logits = logits.index_fill(-1, torch.tensor(masked, device=logits.device), -torch.inf)
        if not self.is_sparse(experts):
            weights, mixed, ids = logits.softmax(dim=-1), logits.shape[-1] - len(masked), None
        else:
            ids = select_topk(logits, self.top_k, bias.to(logits.device))
            weights, mixed = sparse_weights(logits, ids), ids.shape[-1]
        if self.expert_scale == UNIT and mixed > 1:
            weights = weights * mixed
        return RouterOutput(weights, logits, ids)

    def top1_fast_path(self, hidden_states: Tensor, gate: int = 0, experts: Sequence[int] | None = None) -> int | None:
        """Return the only expert of a single token, without its logits; for decoding on a CPU.

        The weight of a single expert is 1, and scaling a token's logits does not change which is the largest.

        Args:
            hidden_states: ``(batch, seq, hidden_size)``.
            gate: Index of the gate.
            experts: Indices of the experts to route among; all of them by default.

        Returns:
            The expert's column among ``experts``. None for several tokens, for ``top_k`` above 1, dense or biased
            routing or fewer experts, on an accelerator, with gradients and under a compiler: use ``forward``.
        """
        one_token = hidden_states.shape[0] == hidden_states.shape[1] == 1 and hidden_states.device.type == "cpu"
        if not one_token or self.top_k > 1 or torch.compiler.is_compiling() or not self.is_sparse(experts):
            return None
        if torch.is_grad_enabled() or (experts is not None and len(experts) < self.num_experts):
            return None
        if self.selection_bias.any() or self.experts_per_gate is not None:
            return None
        with in_place(self.gates):
            weight = self.gates[gate]
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)).view(-1)
        return int(torch.mv(weight.to(wide.dtype), wide).argmax())

    def _masked_experts(self, gate: int, experts: Sequence[int] | None) -> list[int]:
        """Return the columns, among ``experts``, that the gate does not have; [] if it has none of them."""
        if self.experts_per_gate is None:
            return []
        routed = range(self.num_experts) if experts is None else experts
        absent = range(self.experts_per_gate[gate], max(self.experts_per_gate))
        masked = [column for column, expert in enumerate(routed) if expert in absent]
        return masked if len(masked) < len(routed) else []

    def _logit_scale(self, hidden_states: Tensor) -> Tensor:
        """Return the factor on each token's logits by RMS norm and temperature, ``(batch, seq, 1)``.

        Scaling the logits equals scaling the hidden states, and there are fewer of them.
        """
        norm: Tensor = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        # sqrt(H) / |x| is 1 / rms(x); clamped for a row of zeros
        return math.sqrt(self.hidden_size) / self.temperature / norm.clamp(min=_SMALLEST_NORM)

    @torch.no_grad()
    def add_expert(self) -> int:
        """Add a young expert to every gate and return its index.

        The old rows are copied, so that the ratios of the old experts' weights stay the same for every input. The new
        row is their mean: the new expert begins with a fair share, wherever the logits have drifted.
        """
        for index, gate in enumerate(self.gates):
            grown = torch.cat([gate, gate.mean(dim=0, keepdim=True)])
            self.gates[index] = nn.Parameter(grown, requires_grad=gate.requires_grad)
        self.selection_bias = F.pad(self.selection_bias, (0, 1))
        self.expert_load = torch.cat([self.expert_load, self.expert_load.mean(dim=1, keepdim=True)], dim=1)
        self.maturity.append(YOUNG)
        return self.num_experts - 1

    @override
    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"temperature={self.temperature}, num_gates={len(self.gates)}"
        )


def rms_normalize(hidden_states: Tensor) -> Tensor:
    """Scale hidden states, ``(..., hidden_size)``, to a root mean square of 1, in float32 at least.

    A gate's logits are its weight times these, over the temperature.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide * (math.sqrt(wide.shape[-1]) / norm.clamp(min=_SMALLEST_NORM))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def select_topk(logits: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Tensor:
    """Return the indices of the ``top_k`` best experts of each token, ``(..., top_k)``, best first.

    Args:
        logits: ``(..., num_experts)``.
        top_k: Number of experts to select; all where there are fewer.
        selection_bias: ``(num_experts,)``, added for the selection only, never to the weights (DeepSeek-V3, 2024,
            section 2.1.2).
    """
    scores = logits if selection_bias is None else logits + selection_bias
    return scores.topk(min(top_k, logits.shape[-1]), dim=-1).indices


def sparse_weights(logits: Tensor, topk_expert_ids: Tensor) -> Tensor:
    """Return the softmax over each token's top-k experts, exactly 0 elsewhere.

    Args:
        logits: ``(..., num_experts)``.
        topk_expert_ids: ``(..., top_k)``, as ``select_topk`` returns them.

    Returns:
        ``(..., num_experts)``; rows sum to 1.
    """
    if topk_expert_ids.shape[-1] == 1:
        return torch.zeros_like(logits).scatter_(-1, topk_expert_ids, 1.0)
    topk_weights = logits.gather(-1, topk_expert_ids).softmax(dim=-1)
    return torch.zeros_like(logits).scatter(-1, topk_expert_ids, topk_weights)
