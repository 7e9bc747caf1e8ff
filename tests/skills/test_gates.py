"""The closed-form gate against batch regressions in float64, and what gradient-trained ones forget."""

import pytest
import torch
from forgetting_gates import GradientGate
from torch import Tensor

from dylo_moe.core.router import DynamicHybridRouter, rms_normalize
from dylo_moe.skills.gates import RidgeGate

WIDTH = 24


def skill(index: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Tokens that scatter around a direction of the skill's own, normalised as features are."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
    return rms_normalize(1.5 * centre + torch.randn(tokens, WIDTH, generator=generator))


def batch_ridge(bodies: list[tuple[Tensor, int]], experts: int, ridge: float) -> Tensor:
    """All tokens of all bodies in one least-squares problem, each body weighing 1: solved by QR, not by sums."""
    rows = torch.cat([tokens.double() / len(tokens) ** 0.5 for tokens, _ in bodies])
    targets = torch.cat(
        [
            torch.eye(experts, dtype=torch.float64)[[expert] * len(tokens)] / len(tokens) ** 0.5
            for tokens, expert in bodies
        ]
    )
    penalty = ridge * rows.square().sum() / WIDTH
    wide = torch.cat([rows, penalty.sqrt() * torch.eye(WIDTH, dtype=torch.float64)])
    return torch.linalg.lstsq(wide, torch.cat([targets, torch.zeros(WIDTH, experts, dtype=torch.float64)])).solution.T


def accuracy(weight: Tensor, experts: int) -> list[float]:
    return [
        float(((skill(index, seed=1).to(weight) @ weight.T).argmax(dim=1) == index).double().mean())
        for index in range(experts)
    ]


def test_skills_one_by_one_give_the_batch_solution_of_all_data() -> None:
    bodies = [(skill(0, 300), 0), (skill(1, 50), 1), (skill(2, 120), 2), (skill(3, 80), 1)]
    gate = RidgeGate(WIDTH, ridge=1e-2)
    for count, (tokens, expert) in enumerate(bodies, start=1):
        gate.learn(tokens, expert)
        wanted = batch_ridge(bodies[:count], gate.num_experts, 1e-2)
        assert torch.allclose(gate.solution(), wanted, rtol=1e-9, atol=1e-12)


def test_the_order_of_skills_and_of_their_parts_does_not_matter() -> None:
    one, other = RidgeGate(WIDTH), RidgeGate(WIDTH)
    for expert in (0, 1, 0):
        one.learn(skill(expert, seed=expert), expert)
    for expert in (0, 0, 1):
        other.learn(skill(expert, seed=expert), expert)
    assert torch.allclose(one.weight(), other.weight(), rtol=1e-10)


def test_going_on_from_saved_sums_is_going_on() -> None:
    whole, first, second = RidgeGate(WIDTH), RidgeGate(WIDTH), RidgeGate(WIDTH)
    for gate in (whole, first):
        gate.learn(skill(0), 0)
        gate.learn(skill(1), 1)
    second.load(first.state())
    for gate in (whole, second):
        gate.learn(skill(2), 2)
    assert torch.equal(whole.weight(), second.weight())
    assert first.num_experts == 2, "what was saved does not change with what goes on from it"


def test_sharpening_keeps_the_choice_and_gives_the_own_expert_most_of_the_weight() -> None:
    gate = RidgeGate(WIDTH)
    for index in range(4):
        gate.learn(skill(index), index)
    tokens = skill(2, seed=1).double()
    assert torch.equal((tokens @ gate.weight().T).argmax(dim=1), (tokens @ gate.solution().T).argmax(dim=1))
    assert (tokens @ gate.weight().T).softmax(dim=1)[:, 2].mean() > 0.8


def test_the_router_that_gets_the_weight_scores_as_the_gate_does() -> None:
    gate = RidgeGate(WIDTH)
    for index in range(2):
        gate.learn(skill(index), index)
    router = DynamicHybridRouter(WIDTH, 2, top_k=1)
    with torch.no_grad():
        router.gates[0].copy_(gate.weight())
    hidden = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(9)) * 7
    assert torch.allclose(router(hidden).logits, rms_normalize(hidden) @ gate.weight().float().T, rtol=1e-5, atol=1e-5)


def test_the_closed_form_forgets_nothing_a_gradient_does_and_replay_helps() -> None:
    gates = {"ridge": RidgeGate(WIDTH), "gradient": GradientGate(WIDTH), "replay": GradientGate(WIDTH, replay=60)}
    for gate in gates.values():
        for index in range(4):
            gate.learn(skill(index), index)
    found = {name: accuracy(gate.weight(), 4) for name, gate in gates.items()}
    assert min(found["ridge"]) > 0.9
    assert sum(found["gradient"]) / 4 < 0.6 and found["gradient"][3] > 0.9
    assert min(found["replay"]) > max(0.7, min(found["gradient"]))


def test_the_replay_buffer_stays_as_small_as_was_asked_for() -> None:
    gate = GradientGate(WIDTH, replay=10, steps=1)
    for index in range(3):
        gate.learn(skill(index), index)
    assert [len(kept) for kept in gate._kept] == [3, 3, 3]


def test_what_cannot_be_learned_is_refused() -> None:
    gate = RidgeGate(WIDTH)
    with pytest.raises(ValueError, match="next new one"):
        gate.learn(skill(0), 1)
    with pytest.raises(ValueError, match="features"):
        gate.learn(torch.zeros(3, WIDTH + 1), 0)
    with pytest.raises(ValueError, match="ridge"):
        RidgeGate(WIDTH, ridge=0)
