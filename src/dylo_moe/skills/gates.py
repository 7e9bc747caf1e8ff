"""A linear gate that is taught a growing number of experts, one after the other, and forgets none.

It reads the features that the model's router reads, which no expert changes. What it is better than, and what not, is
measured by ``benchmarks/forgetting.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_RIDGE = 1e-3
CONFIDENCE = 0.95
"""The weight that a skill's mean feature gives its own expert against the next one, on average, in soft routing."""


class RidgeGate:
    """Ridge regression from features to experts, in closed form and in float64.

    After Any-SSR (Tong et al. 2025, "Analytic Subspace Routing: How Recursive Least Squares Works in Continual Learning
    of Large Language Model"), without its random expansion of the features, so that the result is an ordinary gate.
    Each body of data counts alike, however long it is: its sums are divided by its tokens. Recursive least squares
    updates the inverse of the Gram matrix; here the matrix itself is updated, and solved when the gate is wanted. The
    solution is the same, with less rounding, and its cost does not depend on how much was seen.

    Args:
        hidden_size: Width of the features.
        ridge: Penalty on the weights, as a multiple of the features' mean variance.
    """

    def __init__(self, hidden_size: int, ridge: float = DEFAULT_RIDGE) -> None:
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge}")
        self.hidden_size, self.ridge = hidden_size, ridge
        self._gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._cross = torch.zeros(0, hidden_size, dtype=torch.float64)
        self._bodies = torch.zeros(0, dtype=torch.float64)

    @property
    def num_experts(self) -> int:
        """How many it tells apart: one more than the largest that it was taught."""
        return len(self._cross)

    def learn(self, features: Tensor, expert: int) -> None:
        """Takes in the tokens of one body of data.

        Args:
            features: ``(tokens, hidden_size)``, as ``core.features.base_features`` gives them; real tokens alone.
            expert: The expert that they belong to: one that is known, or the next new one.

        Raises:
            ValueError: The shape is another one, or there are experts in between that were never taught.
        """
        if features.ndim != 2 or features.shape[1] != self.hidden_size or not len(features):
            raise ValueError(f"features must be (tokens, {self.hidden_size}), got {tuple(features.shape)}")
        if not 0 <= expert <= self.num_experts:
            raise ValueError(f"expert must be from 0 to {self.num_experts}, the next new one, got {expert}")
        if expert == self.num_experts:
            self._cross = F.pad(self._cross, (0, 0, 0, 1))
            self._bodies = F.pad(self._bodies, (0, 1))
        wide = features.detach().cpu().double()
        self._gram += wide.T @ wide / len(wide)
        self._cross[expert] += wide.mean(dim=0)
        self._bodies[expert] += 1

    def solution(self) -> Tensor:
        """The regression's coefficients as they are, ``(num_experts, hidden_size)`` float64."""
        penalty = self.ridge * self._gram.trace() / self.hidden_size
        regularised = self._gram + penalty * torch.eye(self.hidden_size, dtype=torch.float64)
        factor = torch.linalg.cholesky(regularised)
        return torch.cholesky_solve(self._cross.T, factor).T

    def weight(self) -> Tensor:
        """The solution, sharpened for a softmax; which expert is best, and so routing to one, is left as it is.

        ``(num_experts, hidden_size)``: the router's logits are features times its transpose.
        """
        solution = self.solution()
        if self.num_experts == 1:
            return solution
        taught = self._bodies > 0
        scores = (self._cross / self._bodies[:, None].clamp(min=1)) @ solution.T
        others = scores.masked_fill(torch.eye(self.num_experts, dtype=torch.bool), -torch.inf)
        margin = (scores.diagonal() - others.max(dim=1).values)[taught].mean()
        # experts that features do not tell apart have no margin that could be widened
        wanted = math.log(CONFIDENCE / (1 - CONFIDENCE))
        return solution * (wanted / margin if margin > 1e-6 else 1.0)

    def state(self) -> dict[str, Tensor]:
        """The sums, all that is kept of the data; ``load`` takes them."""
        return {"gram": self._gram, "cross": self._cross, "bodies": self._bodies}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from the sums of another gate of this width."""
        self._gram, self._cross, self._bodies = (state[name].clone() for name in ("gram", "cross", "bodies"))

    def forget(self, expert: int) -> None:
        """Drops an expert; its tokens go on to count as such that are none of the others'."""
        kept = [index for index in range(self.num_experts) if index != expert]
        self._cross, self._bodies = self._cross[kept], self._bodies[kept]

    def merge(self, expert: int, other: int) -> None:
        """Make the tokens of two experts those of the first: what it would be, had they been taught so."""
        if other >= self.num_experts:  # it was never taught
            return
        missing = max(expert + 1 - self.num_experts, 0)
        self._cross, self._bodies = F.pad(self._cross, (0, 0, 0, missing)), F.pad(self._bodies, (0, missing))
        self._cross[expert] += self._cross[other]
        self._bodies[expert] += self._bodies[other]
        self.forget(other)
