"""Tests of the closed-form gate against batch regressions in float64."""

import pytest
import torch
from torch import Tensor

from dylo_moe.core.routing.router import DynamicHybridRouter, rms_normalize
from dylo_moe.skills.ridge_gate import RidgeGate

WIDTH = 24


def skill(index: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Return normalized tokens scattered around a direction of the skill."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
    return rms_normalize(1.5 * centre + torch.randn(tokens, WIDTH, generator=generator))


def batch_ridge(datasets: list[tuple[Tensor, int]], experts: int, ridge: float) -> Tensor:
    """Return the solution of one least-squares problem over all tokens, each dataset with weight 1, by QR."""
    rows = torch.cat([tokens.double() / len(tokens) ** 0.5 for tokens, _ in datasets])
    targets = torch.cat(
        [
            torch.eye(experts, dtype=torch.float64)[[expert] * len(tokens)] / len(tokens) ** 0.5
            for tokens, expert in datasets
        ]
    )
    penalty = ridge * rows.square().sum() / WIDTH
    wide = torch.cat([rows, penalty.sqrt() * torch.eye(WIDTH, dtype=torch.float64)])
    return torch.linalg.lstsq(wide, torch.cat([targets, torch.zeros(WIDTH, experts, dtype=torch.float64)])).solution.T


def test_learning_one_by_one_gives_the_batch_solution() -> None:
    datasets = [(skill(0, 300), 0), (skill(1, 50), 1), (skill(2, 120), 2), (skill(3, 80), 1)]
    gate = RidgeGate(WIDTH, ridge=1e-2)
    for count, (tokens, expert) in enumerate(datasets, start=1):
        gate.learn(tokens, expert)
        wanted = batch_ridge(datasets[:count], gate.num_experts, 1e-2)
        assert torch.allclose(gate.solution(), wanted, rtol=1e-9, atol=1e-12)


def test_the_order_of_skills_and_of_their_parts_does_not_matter() -> None:
    one, other = RidgeGate(WIDTH), RidgeGate(WIDTH)
    for expert in (0, 1, 0):
        one.learn(skill(expert, seed=expert), expert)
    for expert in (0, 0, 1):
        other.learn(skill(expert, seed=expert), expert)
    assert torch.allclose(one.weight(), other.weight(), rtol=1e-10)


def test_learning_continues_from_saved_sums() -> None:
    whole, first, second = RidgeGate(WIDTH), RidgeGate(WIDTH), RidgeGate(WIDTH)
    for gate in (whole, first):
        gate.learn(skill(0), 0)
        gate.learn(skill(1), 1)
    second.load(first.state())
    for gate in (whole, second):
        gate.learn(skill(2), 2)
    assert torch.equal(whole.weight(), second.weight())
    assert first.num_experts == 2, "the saved sums do not change with the gate that loaded them"


def test_scaling_keeps_the_choice_and_gives_the_right_expert_most_of_the_weight() -> None:
    gate = RidgeGate(WIDTH)
    for index in range(4):
        gate.learn(skill(index), index)
    tokens = skill(2, seed=1).double()
    assert torch.equal((tokens @ gate.weight().T).argmax(dim=1), (tokens @ gate.solution().T).argmax(dim=1))
    assert (tokens @ gate.weight().T).softmax(dim=1)[:, 2].mean() > 0.8


def test_a_router_with_the_weight_has_the_scores_of_the_gate() -> None:
    gate = RidgeGate(WIDTH)
    for index in range(2):
        gate.learn(skill(index), index)
    router = DynamicHybridRouter(WIDTH, 2, top_k=1)
    with torch.no_grad():
        router.gates[0].copy_(gate.weight())
    hidden = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(9)) * 7
    assert torch.allclose(router(hidden).logits, rms_normalize(hidden) @ gate.weight().float().T, rtol=1e-5, atol=1e-5)


def test_wrong_features_and_experts_are_refused() -> None:
    gate = RidgeGate(WIDTH)
    with pytest.raises(ValueError, match="next new one"):
        gate.learn(skill(0), 1)
    with pytest.raises(ValueError, match="features"):
        gate.learn(torch.zeros(3, WIDTH + 1), 0)
    with pytest.raises(ValueError, match="ridge"):
        RidgeGate(WIDTH, ridge=0)
