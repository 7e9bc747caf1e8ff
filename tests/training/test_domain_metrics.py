"""Per-example sums of an evaluation and the metrics computed from them, by numbers worked out manually."""

import numpy as np
import pytest
import torch

from dylo_moe.core.model import DyLoRAOutput
from dylo_moe.training.domain_metrics import domain_metrics, example_sums


def test_sums_cover_labelled_and_real_tokens_only() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    weights = torch.rand(2, 2, 4, 3).softmax(dim=-1)
    sums = example_sums(DyLoRAOutput(logits=logits, routing_weights=weights), labels, mask, 3)
    log_p = logits.log_softmax(dim=-1)
    assert sums[0, 0].item() == pytest.approx(-(log_p[0, 0, 1] + log_p[0, 1, 2]).item(), rel=1e-6)
    assert sums[1, 0].item() == pytest.approx(-(log_p[1, 1, 3] + log_p[1, 2, 4]).item(), rel=1e-6)
    assert sums[:, 1].tolist() == [2, 2]
    assert sums[:, 2].tolist() == [3, 4]
    expected = torch.stack([weights.mean(0)[0, :3].sum(0), weights.mean(0)[1].sum(0)])
    torch.testing.assert_close(sums[:, 3:], expected.double())
    unit = example_sums(DyLoRAOutput(logits=logits, routing_weights=3 * weights), labels, mask, 3)
    torch.testing.assert_close(unit, sums)


def test_without_a_router_usage_is_zero() -> None:
    sums = example_sums(DyLoRAOutput(logits=torch.zeros(1, 2, 3)), torch.tensor([[0, 1]]), torch.ones(1, 2), 2)
    assert sums[0, 3:].tolist() == [0, 0]


def test_losses_are_means_over_tokens_and_domains_have_equal_weight() -> None:
    sums = np.array(
        [  # loss, labelled, real, two experts
            [6.0, 3, 4, 1.0, 3.0],
            [2.0, 1, 6, 3.0, 3.0],
            [1.0, 4, 5, 5.0, 0.0],
        ]
    )
    metrics = domain_metrics(sums, np.array([0, 0, 1]), ["a", "b"], ["x", "y"])
    assert metrics["loss/a"] == 8 / 4
    assert metrics["loss/b"] == 1 / 4
    assert metrics["mean_domain_loss"] == (2 + 0.25) / 2
    assert metrics["loss"] == 9 / 8
    assert (metrics["usage/a/x"], metrics["usage/a/y"]) == (0.4, 0.6)
    assert (metrics["usage/b/x"], metrics["usage/b/y"]) == (1.0, 0.0)


def test_a_domain_without_rows_and_an_idle_router_are_left_out() -> None:
    metrics = domain_metrics(np.array([[2.0, 1, 1, 0.0]]), np.array([1]), ["a", "b"], ["x"])
    assert set(metrics) == {"loss", "loss/b", "mean_domain_loss"}
