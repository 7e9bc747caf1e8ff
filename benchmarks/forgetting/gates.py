"""Gates that learn the skills of a stream one after the other, and measures of novelty."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.skills.acquisition import SkillFeatures
from dylo_moe.skills.continual_metrics import routing_accuracy
from dylo_moe.skills.library import ENTROPY, MEASURES, SkillLibrary
from dylo_moe.skills.novelty import auroc, router_entropy
from dylo_moe.skills.ridge_gate import RidgeGate

REPLAYED_TOKENS = 2000


class GradientGate:
    """Softmax regression by AdamW on the tokens of the current skill and on a small replay buffer.

    Args:
        hidden_size: Width of the features.
        replay: Tokens to keep in total, the same number of each expert; 0 for none.
        steps: Optimizer steps for each skill.
        batch_size: Tokens in a step; with a replay, half of them are old ones.
        learning_rate: Learning rate of AdamW.
        seed: Seed of the batches and the buffer.
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
        self.hidden_size = hidden_size
        self.replay, self.steps, self.batch_size, self.learning_rate = replay, steps, batch_size, learning_rate
        self._random = torch.Generator().manual_seed(seed)
        self._weight = torch.zeros(0, hidden_size)
        self._kept: list[Tensor] = []
        """Kept tokens of each expert."""

    def weight(self) -> Tensor:
        """Return the weight ``(experts, hidden_size)``, as ``RidgeGate.weight`` does."""
        return self._weight

    def learn(self, features: Tensor, expert: int) -> None:
        """Train on the tokens of one skill, ``(tokens, hidden_size)``, of a known expert or the next one."""
        if expert == len(self._kept):
            # as in the router, a new expert starts with the mean of the others
            row = self._weight.mean(dim=0, keepdim=True) if expert else torch.zeros(1, self.hidden_size)
            self._weight = torch.cat([self._weight, row])
            self._kept.append(torch.zeros(0, self.hidden_size))
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
        """Give each expert an even share of the buffer, drawn at random from its old and its new tokens."""
        share = self.replay // len(self._kept)
        self._kept[expert] = torch.cat([self._kept[expert], new])
        for index, kept in enumerate(self._kept):
            self._kept[index] = kept[torch.randperm(len(kept), generator=self._random)[:share]]


class Taught(NamedTuple):
    """The learned gates, by name.

    Attributes:
        figures: ``tokens`` and ``examples``, the shares that go to the right expert, 0 to 1.
        weights: Weight of each gate, for a router.
    """

    figures: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]


def gates(seen: Sequence[SkillFeatures], held_out: Sequence[SkillFeatures], seed: int) -> Taught:
    """Train each gate on one skill after the other, and measure it on held-out rows.

    Args:
        seen: Features of training rows, one entry per skill.
        held_out: Features of held-out rows, one entry per skill.
        seed: Seed of the gates that draw random batches.
    """
    width = seen[0].tokens.shape[1]
    every: dict[str, RidgeGate | GradientGate] = {
        "closed form": RidgeGate(width),
        "gradient": GradientGate(width, seed=seed),
        "gradient, replay": GradientGate(width, REPLAYED_TOKENS, seed=seed),
    }
    found = Taught({}, {})
    for name, gate in every.items():
        for skill, one in enumerate(seen):
            gate.learn(one.tokens, skill)
        found.weights[name] = gate.weight().float()
        tokens, examples = accuracy(found.weights[name], held_out)
        found.figures[name] = {"tokens": tokens, "examples": examples}
    return found


def closed_form(seen: Sequence[SkillFeatures], held_out: Sequence[SkillFeatures]) -> dict[str, Any]:
    """Return the routing accuracy of the closed form alone, on features that no router of the study reads."""
    gate = RidgeGate(seen[0].tokens.shape[1])
    for skill, one in enumerate(seen):
        gate.learn(one.tokens, skill)
    tokens, examples = accuracy(gate.weight().float(), held_out)
    return {"tokens": tokens, "examples": examples}


def accuracy(weight: Tensor, held_out: Sequence[SkillFeatures]) -> tuple[float, float]:
    """Return the share of tokens, and of examples, that a gate sends to the expert of their skill."""
    first = np.cumsum([0, *(len(one.embeddings) for one in held_out)])
    shares = torch.cat([(one.tokens @ weight.T).softmax(dim=-1) for one in held_out]).numpy()
    right = np.repeat(np.arange(len(held_out)), [len(one.tokens) for one in held_out])
    example = np.concatenate([one.example.numpy() + start for one, start in zip(held_out, first, strict=False)])
    return routing_accuracy(shares, right, example)


def novelty(library: SkillLibrary, seen: Sequence[SkillFeatures], held_out: Sequence[SkillFeatures]) -> dict[str, Any]:
    """Return the AUROC of each measure: a (known skill, new skill) matrix by distance, a list by entropy."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        table = library.pair_aurocs(measure).tolist()
        found[measure] = [
            [None if one == other else value for other, value in enumerate(row)] for one, row in enumerate(table)
        ]
    found[ENTROPY] = [_entropy_auroc(new, seen, held_out) for new in range(len(seen))]
    return found


def _entropy_auroc(new: int, seen: Sequence[SkillFeatures], held_out: Sequence[SkillFeatures]) -> float:
    """Return the AUROC of one skill by the entropy of a router that knows all the others."""
    gate = RidgeGate(seen[0].tokens.shape[1])
    others = [skill for skill in range(len(seen)) if skill != new]
    for column, skill in enumerate(others):
        gate.learn(seen[skill].tokens, column)
    known = torch.cat([held_out[skill].routed for skill in others])
    scores = [
        router_entropy((rows.double() @ gate.weight().T).softmax(dim=-1)) for rows in (known, held_out[new].routed)
    ]
    return auroc(scores[0].numpy(), scores[1].numpy())
