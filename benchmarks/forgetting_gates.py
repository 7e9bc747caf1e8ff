"""Gates taught the skills of a stream one after the other, and how novelty shows, for ``forgetting.py``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dylo_moe.skills.acquisition import Look
from dylo_moe.skills.gates import Gate, GradientGate, RidgeGate
from dylo_moe.skills.library import ENTROPY, MEASURES, SkillLibrary
from dylo_moe.skills.metrics import routing_accuracy
from dylo_moe.skills.novelty import auroc, router_entropy

REPLAYED_TOKENS = 2000


class Taught(NamedTuple):
    """What became of each gate, by its name.

    Attributes:
        figures: ``tokens`` and ``examples``, the shares that are routed rightly.
        weights: For a router.
    """

    figures: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]


def gates(seen: Sequence[Look], held_out: Sequence[Look], seed: int) -> Taught:
    """Teaches each gate what was seen of each skill in turn, and asks it about held-out rows.

    Args:
        seen: Of each skill, training rows.
        held_out: Of each skill, other rows.
        seed: Of the gates that draw.
    """
    width = seen[0].tokens.shape[1]
    every: dict[str, Gate] = {
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


def closed_form(seen: Sequence[Look], held_out: Sequence[Look]) -> dict[str, Any]:
    """Routing accuracy of the closed form alone, on features that no router of the study reads."""
    gate = RidgeGate(seen[0].tokens.shape[1])
    for skill, one in enumerate(seen):
        gate.learn(one.tokens, skill)
    tokens, examples = accuracy(gate.weight().float(), held_out)
    return {"tokens": tokens, "examples": examples}


def accuracy(weight: Tensor, held_out: Sequence[Look]) -> tuple[float, float]:
    """The share of tokens, and of examples, that a gate sends to the expert of their skill."""
    first = np.cumsum([0, *(len(one.embeddings) for one in held_out)])
    shares = torch.cat([(one.tokens @ weight.T).softmax(dim=-1) for one in held_out]).numpy()
    right = np.repeat(np.arange(len(held_out)), [len(one.tokens) for one in held_out])
    example = np.concatenate([one.example.numpy() + start for one, start in zip(held_out, first, strict=False)])
    return routing_accuracy(shares, right, example)


def novelty(library: SkillLibrary, seen: Sequence[Look], held_out: Sequence[Look]) -> dict[str, Any]:
    """AUROC of each measure: by distance for each known skill (a row) and new one, by entropy for each new one."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        table = library.pair_aurocs(measure).tolist()
        found[measure] = [
            [None if one == other else value for other, value in enumerate(row)] for one, row in enumerate(table)
        ]
    found[ENTROPY] = [_entropy_auroc(new, seen, held_out) for new in range(len(seen))]
    return found


def _entropy_auroc(new: int, seen: Sequence[Look], held_out: Sequence[Look]) -> float:
    """How well one skill stands out by the entropy of a router that knows all the others."""
    gate = RidgeGate(seen[0].tokens.shape[1])
    others = [skill for skill in range(len(seen)) if skill != new]
    for column, skill in enumerate(others):
        gate.learn(seen[skill].tokens, column)
    known = torch.cat([held_out[skill].routed for skill in others])
    scores = [
        router_entropy((rows.double() @ gate.weight().T).softmax(dim=-1)) for rows in (known, held_out[new].routed)
    ]
    return auroc(scores[0].numpy(), scores[1].numpy())
