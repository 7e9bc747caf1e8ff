"""The learning-rate schedule, by numbers worked out manually."""

import math
from operator import sub

import pytest
import torch
from transformers import get_scheduler

from dylo_moe.training.schedules import restarted_cosine, warm_restarts


def factor(step: int, warmup: int = 4, total: int = 20) -> float:
    return restarted_cosine(step, num_warmup_steps=warmup, num_training_steps=total, cycles=2)


def test_each_of_two_cycles_warms_up_and_decays() -> None:
    # ten steps a cycle, two of them up, eight of them down
    wanted = {0: 0, 1: 0.5, 2: 1, 4: 0.5 + math.sqrt(2) / 4, 6: 0.5, 9: 0.5 * (1 + math.cos(7 / 8 * math.pi))}
    for step, share in wanted.items():
        assert factor(step) == pytest.approx(share, abs=1e-12)
        assert factor(step + 10) == pytest.approx(share, abs=1e-12), "the second cycle must repeat the first"
    assert factor(20) == factor(25) == 0


def test_without_a_warm_up_each_cycle_begins_at_the_peak() -> None:
    assert [factor(step, warmup=0) for step in (0, 5, 10, 15)] == pytest.approx([1, 0.5, 1, 0.5])


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_have_rates_from_0_to_the_peak(total: int) -> None:
    assert all(0 <= factor(step, warmup=1, total=total) <= 1 for step in range(total + 2))


def test_transformers_own_restarts_do_not_warm_up_again() -> None:
    """The reason for a schedule of our own; if this fails, theirs can replace it."""

    def second_cycle(schedule: torch.optim.lr_scheduler.LambdaLR) -> list[float]:
        rates = []
        for _ in range(15):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return rates[10:13]

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)

    assert second_cycle(warm_restarts(optimizer(), 4, 20)) == pytest.approx([0, 1, 2])
    options = {"num_warmup_steps": 4, "num_training_steps": 20, "scheduler_specific_kwargs": {"num_cycles": 2}}
    theirs = get_scheduler("cosine_with_restarts", optimizer(), **options)
    assert max(map(sub, second_cycle(theirs)[1:], second_cycle(theirs))) > 1.5, "up in one step"
