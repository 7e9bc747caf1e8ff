"""Three ways to teach one linear gate a growing number of experts, behind one interface.

``RidgeGate`` forgets nothing: the solution depends on sums over all tokens ever seen, and the sums are what it keeps.
``GradientGate`` learns by steps on what it is shown now, and with a ``replay`` also on a few tokens of before; it is
here to be compared with. All read the features that the model's router reads, which no expert changes.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

DEFAULT_RIDGE = 1e-3
CONFIDENCE = 0.95
"""The weight that a skill's mean feature gives its own expert against the next one, on average, in soft routing."""


class Gate(ABC):
    """What learns to tell experts by features.

    Args:
        hidden_size: Width of the features.

    Attributes:
        num_experts: How many it tells apart: one more than the largest that it was taught.
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.num_experts = 0

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
            self._grow()
            self.num_experts += 1
        self._learn(features, expert)

    @abstractmethod
    def weight(self) -> Tensor:
        """The gate's weight, ``(num_experts, hidden_size)``: the router's logits are features times its transpose."""

    @abstractmethod
    def _grow(self) -> None: ...

    @abstractmethod
    def _learn(self, features: Tensor, expert: int) -> None: ...


class RidgeGate(Gate):
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
        super().__init__(hidden_size)
        self.ridge = ridge
        self._gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._cross = torch.zeros(0, hidden_size, dtype=torch.float64)
        self._bodies = torch.zeros(0, dtype=torch.float64)

    def solution(self) -> Tensor:
        """The regression's coefficients as they are, ``(num_experts, hidden_size)`` float64."""
        penalty = self.ridge * self._gram.trace() / self.hidden_size
        regularised = self._gram + penalty * torch.eye(self.hidden_size, dtype=torch.float64)
        factor = torch.linalg.cholesky(regularised)
        return torch.cholesky_solve(self._cross.T, factor).T

    @override
    def weight(self) -> Tensor:
        """The solution, sharpened for a softmax; which expert is best, and so routing to one, is left as it is."""
        solution = self.solution()
        if self.num_experts == 1:
            return solution
        scores = (self._cross / self._bodies[:, None]) @ solution.T
        others = scores.masked_fill(torch.eye(self.num_experts, dtype=torch.bool), -torch.inf)
        margin = (scores.diagonal() - others.max(dim=1).values).mean()
        # experts that features do not tell apart have no margin that could be widened
        wanted = math.log(CONFIDENCE / (1 - CONFIDENCE))
        return solution * (wanted / margin if margin > 1e-6 else 1.0)

    def state(self) -> dict[str, Tensor]:
        """The sums, all that is kept of the data; ``load`` takes them."""
        return {"gram": self._gram, "cross": self._cross, "bodies": self._bodies}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from the sums of another gate of this width."""
        self._gram, self._cross, self._bodies = (state[name].clone() for name in ("gram", "cross", "bodies"))
        self.num_experts = len(self._cross)

    def forget(self, expert: int) -> None:
        """Drops an expert; its tokens go on to count as such that are none of the others'."""
        kept = [index for index in range(self.num_experts) if index != expert]
        self._cross, self._bodies = self._cross[kept], self._bodies[kept]
        self.num_experts -= 1

    def merge(self, expert: int, other: int) -> None:
        """Makes the tokens of two experts those of the first: what it would be, had they been taught so."""
        self._cross[expert] += self._cross[other]
        self._bodies[expert] += self._bodies[other]
        self.forget(other)

    @override
    def _grow(self) -> None:
        self._cross = F.pad(self._cross, (0, 0, 0, 1))
        self._bodies = F.pad(self._bodies, (0, 1))

    @override
    def _learn(self, features: Tensor, expert: int) -> None:
        wide = features.detach().cpu().double()
        self._gram += wide.T @ wide / len(wide)
        self._cross[expert] += wide.mean(dim=0)
        self._bodies[expert] += 1


class GradientGate(Gate):
    """Softmax regression by AdamW on the tokens of the day, and on those in a small buffer.

    Args:
        hidden_size: Width of the features.
        replay: Tokens to keep of all bodies of data together, chosen evenly by reservoir sampling of each; 0 for none.
        steps: Optimiser steps for each body of data.
        batch_size: Tokens of a step; with a replay, half of them are old ones.
        learning_rate: AdamW's.
        seed: Of batches and buffer.
    """

    def __init__(
        self,
        hidden_size: int,
        replay: int = 0,
        *,
        steps: int = 300,
        batch_size: int = 256,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__(hidden_size)
        self.replay, self.steps, self.batch_size, self.learning_rate = replay, steps, batch_size, learning_rate
        self._random = torch.Generator().manual_seed(seed)
        self._weight = torch.zeros(0, hidden_size)
        self._kept: list[Tensor] = []
        """Kept tokens of each expert."""

    @override
    def weight(self) -> Tensor:
        return self._weight

    @override
    def _grow(self) -> None:
        # as the router does: the newcomer begins with the mean of the others
        row = self._weight.mean(dim=0, keepdim=True) if self.num_experts else torch.zeros(1, self.hidden_size)
        self._weight = torch.cat([self._weight, row])
        self._kept.append(torch.zeros(0, self.hidden_size))

    @override
    def _learn(self, features: Tensor, expert: int) -> None:
        new = features.detach().cpu().float()
        old = torch.cat(self._kept)
        old_experts = torch.tensor([index for index, kept in enumerate(self._kept) for _ in range(len(kept))])
        weight = self._weight.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=self.learning_rate, weight_decay=0.0)
        for _ in range(self.steps):
            half = self.batch_size // 2 if len(old) else self.batch_size
            tokens = new[torch.randint(len(new), (half,), generator=self._random)]
            experts = torch.full((half,), expert)
            if len(old):
                chosen = torch.randint(len(old), (self.batch_size - half,), generator=self._random)
                tokens, experts = torch.cat([tokens, old[chosen]]), torch.cat([experts, old_experts[chosen]])
            optimizer.zero_grad()
            F.cross_entropy(tokens @ weight.T, experts).backward()
            optimizer.step()
        self._weight = weight.detach()
        self._keep(new, expert)

    def _keep(self, new: Tensor, expert: int) -> None:
        """Gives each expert an even share of the buffer, and fills this one's from what it had and what is new."""
        share = self.replay // self.num_experts
        self._kept[expert] = torch.cat([self._kept[expert], new])
        for index, kept in enumerate(self._kept):
            self._kept[index] = kept[torch.randperm(len(kept), generator=self._random)[:share]]
