"""Linear gate that learns a growing number of experts one after another in closed form, without forgetting.

It takes the features that the model's router reads, which no expert changes. ``benchmarks/forgetting`` compares it
with gates trained by gradients.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_RIDGE = 1e-3
_CONFIDENCE = 0.95
"""Average soft routing weight of the right expert against the next best one, at the mean feature of a dataset."""


class RidgeGate:
    """Ridge regression from features to experts, in closed form and in float64.

    After Any-SSR (Tong et al. 2025, "Analytic Subspace Routing: How Recursive Least Squares Works in Continual Learning
    of Large Language Model"), without its random expansion of the features, so that the result is an ordinary gate.
    Every dataset has the same weight: its sums are divided by its number of tokens. Recursive least squares updates the
    inverse of the Gram matrix; this class updates the matrix itself and solves it on demand. The solution is the same,
    with less rounding, and its cost does not depend on the number of tokens.

    Args:
        hidden_size: Width of the features.
        ridge: Penalty on the weights, as a multiple of the features' mean variance; above 0.

    Raises:
        ValueError: ``ridge`` is not above 0.
    """

    def __init__(self, hidden_size: int, ridge: float = DEFAULT_RIDGE) -> None:
        if not ridge > 0:
            raise ValueError(f"`ridge` must be above 0, got {ridge}")
        self.hidden_size, self.ridge = hidden_size, ridge
        self._gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._cross = torch.zeros(0, hidden_size, dtype=torch.float64)
        self._num_datasets = torch.zeros(0, dtype=torch.float64)

    @property
    def num_experts(self) -> int:
        """Number of experts: one more than the largest number that it learned."""
        return len(self._cross)

    def learn(self, features: Tensor, expert: int) -> None:
        """Add the tokens of one dataset.

        Args:
            features: Features of the real tokens, ``(tokens, hidden_size)``, as ``skills.features.base_features``
                returns them.
            expert: Number of their expert: a known one, or the next new one.

        Raises:
            ValueError: The features have another shape, or ``expert`` skips a number.
        """
        if features.ndim != 2 or features.shape[1] != self.hidden_size or not len(features):
            raise ValueError(f"`features` must be (tokens, {self.hidden_size}), got {tuple(features.shape)}")
        if not 0 <= expert <= self.num_experts:
            raise ValueError(f"`expert` must be from 0 to {self.num_experts}, the next new one, got {expert}")
        if expert == self.num_experts:
            self._cross = F.pad(self._cross, (0, 0, 0, 1))
            self._num_datasets = F.pad(self._num_datasets, (0, 1))
        wide = features.detach().cpu().double()
        self._gram += wide.T @ wide / len(wide)
        self._cross[expert] += wide.mean(dim=0)
        self._num_datasets[expert] += 1

    def solution(self) -> Tensor:
        """Return the coefficients of the regression, ``(num_experts, hidden_size)`` float64."""
        penalty = self.ridge * self._gram.trace() / self.hidden_size
        regularized = self._gram + penalty * torch.eye(self.hidden_size, dtype=torch.float64)
        factor = torch.linalg.cholesky(regularized)
        return torch.cholesky_solve(self._cross.T, factor).T

    def weight(self) -> Tensor:
        """Return the solution scaled for a softmax, which does not change the best expert.

        Returns:
            Weight of a gate, ``(num_experts, hidden_size)`` float64; the logits are the features times its transpose.
        """
        solution = self.solution()
        if self.num_experts == 1:
            return solution
        learned = self._num_datasets > 0
        scores = (self._cross / self._num_datasets[:, None].clamp(min=1)) @ solution.T
        others = scores.masked_fill(torch.eye(self.num_experts, dtype=torch.bool), -torch.inf)
        margin = (scores.diagonal() - others.max(dim=1).values)[learned].mean()
        target = math.log(_CONFIDENCE / (1 - _CONFIDENCE))
        # experts whose features do not differ have no margin to scale
        return solution * (target / margin if margin > 1e-6 else 1.0)

    def state(self) -> dict[str, Tensor]:
        """Return the sums, which are all that is kept of the data, for ``load``."""
        return {"gram": self._gram, "cross": self._cross, "bodies": self._num_datasets}

    def load(self, state: dict[str, Tensor]) -> None:
        """Replace the sums by those of another gate of the same width."""
        self._gram, self._cross, self._num_datasets = (state[name].clone() for name in ("gram", "cross", "bodies"))

    def forget(self, expert: int) -> None:
        """Remove an expert; its tokens continue to count as examples that belong to no other expert."""
        kept = [index for index in range(self.num_experts) if index != expert]
        self._cross, self._num_datasets = self._cross[kept], self._num_datasets[kept]

    def merge(self, expert: int, other: int) -> None:
        """Assign the tokens of ``other`` to ``expert`` and remove ``other``, as if the data had been learned so."""
        if other >= self.num_experts:  # has no tokens
            return
        missing = max(expert + 1 - self.num_experts, 0)
        self._cross, self._num_datasets = (
            F.pad(self._cross, (0, 0, 0, missing)),
            F.pad(self._num_datasets, (0, missing)),
        )
        self._cross[expert] += self._cross[other]
        self._num_datasets[expert] += self._num_datasets[other]
        self.forget(other)
