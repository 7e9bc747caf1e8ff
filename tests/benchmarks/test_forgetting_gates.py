"""Tests of the gradient-trained gates that the forgetting benchmark compares the closed-form gate with."""

import torch
from torch import Tensor

from benchmarks.forgetting.gates import GradientGate
from dylo_moe.core.routing.router import rms_normalize
from dylo_moe.skills.ridge_gate import RidgeGate

WIDTH, SKILLS = 24, 4


def skill(index: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Return normalized tokens scattered around a direction of the skill."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
    return rms_normalize(1.5 * centre + torch.randn(tokens, WIDTH, generator=generator))


def accuracy(weight: Tensor) -> list[float]:
    """Return the fraction of the tokens of each skill that a gate routes to it."""
    return [
        float(((skill(index, seed=1).to(weight) @ weight.T).argmax(dim=1) == index).double().mean())
        for index in range(SKILLS)
    ]


def test_the_closed_form_forgets_nothing_a_gradient_does_and_replay_helps() -> None:
    gates = {"ridge": RidgeGate(WIDTH), "gradient": GradientGate(WIDTH), "replay": GradientGate(WIDTH, replay=60)}
    for gate in gates.values():
        for index in range(SKILLS):
            gate.learn(skill(index), index)
    found = {name: accuracy(gate.weight()) for name, gate in gates.items()}
    assert min(found["ridge"]) > 0.9
    assert sum(found["gradient"]) / SKILLS < 0.6 and found["gradient"][-1] > 0.9
    assert min(found["replay"]) > max(0.7, min(found["gradient"]))


def test_the_replay_buffer_keeps_its_size() -> None:
    gate = GradientGate(WIDTH, replay=10, steps=1)
    for index in range(3):
        gate.learn(skill(index), index)
    assert [len(kept) for kept in gate._kept] == [3, 3, 3]
