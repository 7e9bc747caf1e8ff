"""The router: from hidden states to routing weights.

A linear gate on normalised hidden states, then a softmax over all experts (dense) or over the chosen ``top_k``
of them (sparse). The router knows nothing of LoRA, of layers, or of where its input was read.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dylo_moe.core.offload import in_place
from dylo_moe.errors import RoutingError

YOUNG, MATURE = 0, 1

_SMALLEST_NORM = 1e-6


class RouterOutput(NamedTuple):
    """What a gate gives for each token.

    Attributes:
        weights: Routing weights, ``(batch, seq, num_routed_experts)``.
        logits: What they came from, of the same shape.
        chosen: ``(batch, seq, top_k)``, the experts with a weight above 0; None for dense routing.
    """

    weights: Tensor
    logits: Tensor
    chosen: Tensor | None = None


class DynamicHybridRouter(nn.Module):
    """Routes each token to a mixture of experts; dense while anything is young or training, sparse otherwise.

    Gates are kept and computed in float32 at least, whatever the model's dtype and autocast say: a softmax in
    bfloat16 loses small weights (Switch Transformers, Fedus et al. 2021, section 2.4, "selective precision").

    Args:
        hidden_size: Width of the hidden states.
        num_experts: How many experts to begin with; at least 1.
        top_k: Experts per token when sparse; 1 to ``num_experts``.
        temperature: Divides the logits; above 0. Lower is sharper.
        num_gates: Independent gates, one for each place where a router input is read.
        experts_per_gate: How many of the experts, the first ones, each gate has; all by default. An expert that is
            added later belongs to every gate.

    Attributes:
        maturity: 0 (young) or 1 (mature) for each expert.
        selection_bias: ``(num_gates, num_experts)``; see ``choose``.
        expert_load: ``(num_gates, num_experts)``, how the last global batch of a training run chose; kept here so
            that a run that is resumed goes on with it. Routing does not depend on it.

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
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise RoutingError(f"num_experts must be at least 1, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise RoutingError(f"top_k must be from 1 to num_experts ({num_experts}), got {top_k}")
        if not temperature > 0:
            raise RoutingError(f"temperature must be above 0, got {temperature}")
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.temperature = temperature
        self.experts_per_gate = experts_per_gate
        self.maturity = [YOUNG] * num_experts
        # On RMS-normalised input of width H a gate of this spread gives logits of unit variance or less.
        self.gates = nn.ParameterList(
            nn.Parameter(torch.randn(num_experts, hidden_size) * 0.02) for _ in range(num_gates)
        )
        self.register_buffer("selection_bias", torch.zeros(num_gates, num_experts))
        self.register_buffer("expert_load", torch.ones(num_gates, num_experts))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep gates and biases in float32 at least, also through ``.half()`` and ``.to(torch.bfloat16)``."""

        def widened(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrow else moved

        super()._apply(widened, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def num_experts(self) -> int:
        """How many experts the router can choose from."""
        return len(self.maturity)

    def is_sparse(self, experts: Sequence[int] | None = None) -> bool:
        """Whether routing is sparse now: evaluating, and every routed expert mature."""
        routed = self.maturity if experts is None else [self.maturity[expert] for expert in experts]
        return not self.training and all(maturity == MATURE for maturity in routed)

    def forward(self, hidden_states: Tensor, gate: int = 0, experts: Sequence[int] | None = None) -> RouterOutput:
        """Computes routing weights for each token from that token's hidden state alone.

        Args:
            hidden_states: ``(batch, seq, hidden_size)``, any floating dtype.
            gate: Which gate to use.
            experts: Indices of the experts to route among; all of them by default. The others take no part
                in the computation at all, so leaving one out gives the same bits as never having had it.

        Returns:
            Weights and temperature-scaled logits, float32 (float64 for a float64 input), each
            ``(batch, seq, len(experts))``; each row of weights sums to 1. Where the gate does not have an expert, the
            weight is 0 and the logit -inf.
        """
        with in_place(self.gates):
            weight, bias = self.gates[gate], self.selection_bias[gate]
        if experts is not None and len(experts) < self.num_experts:
            chosen = list(experts)
            weight, bias = weight[chosen], bias[chosen]
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        with _without_autocast(hidden_states.device.type):
            logits = F.linear(hidden_states, weight.to(hidden_states)) * self._scale(hidden_states)
        missing = self._missing(gate, experts)
        if missing:
            logits = logits.index_fill(-1, torch.tensor(missing, device=logits.device), -torch.inf)
        if not self.is_sparse(experts):
            return RouterOutput(logits.softmax(dim=-1), logits)
        best = choose(logits, self.top_k, bias.to(logits.device))
        return RouterOutput(sparse_weights(logits, best), logits, best)

    def choose_one(self, hidden_states: Tensor, gate: int = 0, experts: Sequence[int] | None = None) -> int | None:
        """The expert that one token goes to, where it goes to one alone; the quick way, for decoding on a CPU.

        The weight is then 1, and scaling a row's logits does not change which is the largest.

        Args:
            hidden_states: ``(batch, seq, hidden_size)``.
            gate: Which gate to use.
            experts: Indices of the experts to route among; all of them by default.

        Returns:
            Its place among ``experts``; None for more tokens or experts, for dense or biased routing, on a device that
            one would have to wait for, and under a compiler: ``forward`` does all of these.
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

    def _missing(self, gate: int, experts: Sequence[int] | None) -> list[int]:
        """Places, among ``experts``, of those that the gate does not have; none where it has none of them."""
        if self.experts_per_gate is None:
            return []
        among = range(self.num_experts) if experts is None else experts
        absent = range(self.experts_per_gate[gate], max(self.experts_per_gate))
        missing = [place for place, expert in enumerate(among) if expert in absent]
        return missing if len(missing) < len(among) else []

    def _scale(self, hidden_states: Tensor) -> Tensor:
        """``(batch, seq, 1)``: what the RMS norm and the temperature multiply a row's logits by.

        Applied to the logits, which are few, and not to the hidden states: the product is the same.
        """
        norm: Tensor = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        # sqrt(H) / |x| is 1 / rms(x); the bound keeps a row of zeros finite
        return math.sqrt(self.hidden_size) / self.temperature / norm.clamp(min=_SMALLEST_NORM)

    @torch.no_grad()
    def add_expert(self) -> int:
        """Adds a young expert to every gate and returns its index.

        The old rows are copied as they are, so the ratios of the old experts' weights stay the same for every
        input. The new row is their mean: the newcomer begins with a fair share, wherever the logits have drifted.
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


def normalised(hidden_states: Tensor) -> Tensor:
    """Hidden states at a root mean square of 1, float32 at least: a gate's logits are its weight times these.

    Args:
        hidden_states: ``(..., hidden_size)``.
    """
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide * (math.sqrt(wide.shape[-1]) / norm.clamp(min=_SMALLEST_NORM))


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def choose(logits: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Tensor:
    """The ``top_k`` experts of each row, best first.

    Args:
        logits: ``(..., num_experts)``.
        top_k: How many to choose; all where there are fewer.
        selection_bias: ``(num_experts,)``, added for the choice only, never to the weights (DeepSeek-V3, 2024,
            section 2.1.2).

    Returns:
        Indices, ``(..., top_k)``.
    """
    scores = logits if selection_bias is None else logits + selection_bias
    return scores.topk(min(top_k, logits.shape[-1]), dim=-1).indices


def sparse_weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """Softmax over the chosen experts of each row; exactly 0 elsewhere.

    Args:
        logits: ``(..., num_experts)``.
        chosen: ``(..., top_k)``, as ``choose`` gives them.

    Returns:
        ``(..., num_experts)``; rows sum to 1.
    """
    if chosen.shape[-1] == 1:
        return torch.zeros_like(logits).scatter_(-1, chosen, 1.0)
    kept = logits.gather(-1, chosen).softmax(dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen, kept)
