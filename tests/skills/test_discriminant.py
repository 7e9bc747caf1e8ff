"""Tests of the linear discriminant against Bayes' rule with normal densities."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from dylo_moe.skills.discriminant import solve_discriminant
from dylo_moe.skills.novelty import shrunk_covariance


@pytest.mark.parametrize("sizes", [(30, 30, 30), (5, 40, 12), (2, 2)])
def test_probabilities_are_those_of_normal_densities_with_one_covariance(sizes: tuple[int, ...]) -> None:
    width = 7
    tasks = [torch.randn(size, width, dtype=torch.float64) + 2 * torch.randn(width) for size in sizes]
    found = solve_discriminant(tasks)
    means = [examples.mean(dim=0) for examples in tasks]
    covariance = shrunk_covariance(torch.cat([one - mean for one, mean in zip(tasks, means, strict=True)]))
    densities = [MultivariateNormal(mean, covariance) for mean in means]
    features = torch.randn(3, 4, width, dtype=torch.float64)
    wanted = torch.stack([density.log_prob(features) for density in densities], dim=-1).softmax(dim=-1)
    torch.testing.assert_close(found.logits(features).softmax(dim=-1), wanted)


def test_more_width_than_examples() -> None:
    centers = 3 * torch.randn(4, 64)
    tasks = [center + torch.randn(8, 64) for center in centers]
    found = solve_discriminant(tasks)
    new = torch.cat([center + torch.randn(20, 64) for center in centers])
    assert (found.logits(new).argmax(dim=-1) == torch.arange(4).repeat_interleave(20)).float().mean() > 0.95


def test_examples_that_do_not_differ_give_even_probabilities() -> None:
    found = solve_discriminant([torch.ones(3, 5), torch.ones(3, 5)])
    torch.testing.assert_close(found.logits(torch.randn(2, 5)).softmax(dim=-1), torch.full((2, 2), 0.5).double())
