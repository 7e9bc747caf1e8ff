"""Routing sums and the log entries computed from them, by numbers worked out manually."""

import math

import pytest
import torch
from torch import Tensor

from dylo_moe.core.model import DyLoRAOutput
from dylo_moe.training.monitoring.routing_statistics import (
    RoutingStatistics,
    RoutingSums,
    dead_share,
    routing_entries,
    routing_sums,
)

EVEN = [0.5, 0.5]
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def output_of(weights: list[list[list[list[float]]]], balance: float = 1.0, z: float = 2.0) -> DyLoRAOutput:
    return DyLoRAOutput(
        routing_weights=torch.tensor(weights),
        router_logits=torch.tensor(weights).log().nan_to_num(neginf=-9.0),
        balance_loss=torch.tensor(balance),
        z_loss=torch.tensor(z),
    )


def one_gate() -> DyLoRAOutput:
    """Return weights of two rows of three tokens; those at padding must not count."""
    return output_of([[[[1.0, 0.0], EVEN, [0.0, 1.0]], [[0.25, 0.75], [1.0, 0.0], [1.0, 0.0]]]])


def sums_of(output: DyLoRAOutput, mask: Tensor, domain: Tensor | None, num_domains: int = 2) -> RoutingSums:
    return routing_sums(output, mask, domain, torch.tensor([[2.0, 1.0]]), num_domains)


def test_padding_does_not_count_and_rows_count_for_their_domain() -> None:
    sums = sums_of(one_gate(), MASK, torch.tensor([1, 0]))
    assert sums.tokens.tolist() == [1, 2, 0]
    assert sums.usage.tolist() == [[[0.25, 0.75]], [[1.5, 0.5]], [[0, 0]]]
    entropy = math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert float(sums.entropy) == pytest.approx(entropy, rel=1e-6)
    assert {part.dtype for part in sums} == {torch.float64}


def test_several_gates_are_averaged() -> None:
    sums = sums_of(output_of([[[[1.0, 0.0]]], [[EVEN]]]), torch.ones(1, 1), torch.tensor([0]))
    assert sums.usage[0].tolist() == [[1, 0], [0.5, 0.5]]
    assert sums.shares.tolist() == [[1, 0], [0.5, 0.5]]
    entries = routing_entries(sums, 1, ["a", "b"], ["x", "y"])
    assert (entries["expert_usage/x"], entries["expert_usage/a/y"]) == (0.75, 0.25)
    assert float(sums.entropy) == pytest.approx(math.log(2) / 2)


def test_a_row_without_tokens_changes_nothing() -> None:
    sums = sums_of(one_gate(), torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([1, 0]))
    assert sums.tokens.tolist() == [0, 2, 0]
    assert sums.usage[0].tolist() == [[0, 0]]
    entries = routing_entries(sums, 1, ["a", "b"], ["x", "y"])
    assert "expert_usage/b/x" in entries and "expert_usage/a/x" not in entries


def test_concatenated_rows_keep_their_domain_if_they_share_one() -> None:
    flat = output_of([[[[1.0, 0.0], EVEN]]])
    mask = torch.ones(1, 2)
    together = sums_of(flat, mask, torch.tensor([1, 1, 1]))
    assert together.tokens.tolist() == [0, 2, 0]
    mixed = sums_of(flat, mask, torch.tensor([1, 0, 1]))
    assert mixed.tokens.tolist() == [0, 0, 2]
    assert sums_of(flat, mask, None).tokens.tolist() == [0, 0, 2]
    entries = routing_entries(mixed, 1, ["a", "b"], ["x", "y"])
    assert entries["expert_usage/x"] == 0.75
    assert not any(name.startswith(("expert_usage/a/", "expert_usage/b/")) for name in entries)


def test_entries_are_means_over_tokens_and_losses_over_steps() -> None:
    sums = RoutingSums(
        tokens=torch.tensor([1.0, 3.0, 0.0]),
        usage=torch.tensor([[[1.0, 0.0]], [[0.6, 2.4]], [[0.0, 0.0]]]).expand(3, 2, 2),
        load=torch.tensor([[4.0, 0.0], [2.0, 2.0]]),
        entropy=torch.tensor(2.0),
        balance_loss=torch.tensor(6.0),
        z_loss=torch.tensor(1.0),
        mask_count=torch.ones(2, 2),
    )
    entries = routing_entries(sums, 4, ["a", "b"], ["x", "y"])
    expected = {
        "expert_usage/x": 0.4,
        "expert_usage/y": 0.6,
        "expert_usage/a/x": 1.0,
        "expert_usage/a/y": 0.0,
        "expert_usage/b/x": 0.2,
        "expert_usage/b/y": 0.8,
        "router/entropy": 0.5,
        "router/normalised_entropy": 0.5 / math.log(2),
        "router/balance_loss": 1.5,
        "router/z_loss": 0.25,
        "router/dead_experts": 0.25,  # y at the first of two gates
    }
    assert entries == pytest.approx(expected, rel=1e-6)


def test_normalized_entropy_is_left_out_for_one_expert() -> None:
    output = DyLoRAOutput(
        routing_weights=torch.ones(1, 1, 2, 1),
        router_logits=torch.zeros(1, 1, 2, 1),
        balance_loss=torch.tensor(1.0),
        z_loss=torch.tensor(0.0),
    )
    sums = routing_sums(output, torch.ones(1, 2), torch.tensor([0]), torch.tensor([[2.0]]), 1)
    entries = routing_entries(sums, 1, ["a"], ["x"])
    assert entries["router/entropy"] == 0
    assert "router/normalised_entropy" not in entries


def test_an_expert_is_dead_below_a_tenth_of_an_even_share() -> None:
    all_four = torch.ones(1, 4, dtype=torch.bool)
    assert float(dead_share(torch.tensor([[9.9, 90.1, 150.0, 150.0]]), all_four)) == 0.25
    assert float(dead_share(torch.tensor([[10.0, 90.0, 150.0, 150.0]]), all_four)) == 0
    assert float(dead_share(torch.zeros(2, 4), all_four.expand(2, 4))) == 1


def test_an_expert_missing_at_a_gate_is_not_dead() -> None:
    expert_mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    load = torch.tensor([[5.1, 94.9, 0.0, 0.0], [1.0, 33.0, 33.0, 33.0]])
    assert float(dead_share(load, expert_mask)) == pytest.approx(1 / 6)
    assert float(dead_share(torch.tensor([[4.9, 95.1, 0.0, 0.0]]), expert_mask[:1])) == 0.5


def test_entropy_is_normalized_by_the_experts_that_each_gate_has() -> None:
    logits = torch.tensor([[[[0.0, -torch.inf, -torch.inf]]], [[[0.0, 0.0, -torch.inf]]], [[[0.0, 0.0, 0.0]]]])
    output = DyLoRAOutput(
        routing_weights=logits.softmax(dim=-1),
        router_logits=logits,
        balance_loss=torch.tensor(1.0),
        z_loss=torch.tensor(0.0),
    )
    sums = routing_sums(output, torch.ones(1, 1), torch.tensor([0]), torch.ones(3, 3), 1)
    assert sums.expert_mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    entries = routing_entries(sums, 1, ["a"], ["x", "y", "z"])
    assert entries["router/normalised_entropy"] == pytest.approx(1, rel=1e-6)
    assert entries["expert_usage/x"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_take_sums_over_parts_and_processes_and_resets() -> None:
    statistics = RoutingStatistics(2)
    assert statistics.take(torch.clone) is None
    for domain in ([1, 0], [0, 0]):
        statistics.add(one_gate(), MASK, torch.tensor(domain), torch.tensor([[2.0, 1.0]]))
    taken = statistics.take(lambda flat: 2 * flat)  # as if another process had the same
    assert taken is not None
    assert taken.tokens.tolist() == [8, 4, 0]
    assert taken.usage[1].tolist() == [[3, 1]]
    assert taken.load.tolist() == [[8, 4]]
    assert (float(taken.balance_loss), float(taken.z_loss)) == (4, 8)
    assert statistics.take(torch.clone) is None
