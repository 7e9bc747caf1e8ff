"""Tests of distances, thresholds and scores against hand-worked numbers."""

import math

import pytest
import torch

from dylo_moe.skills.novelty import (
    auroc,
    calibrated_threshold,
    cosine_distances,
    mahalanobis_distances,
    router_entropy,
    shrunk_covariance,
)


def test_cosine_distances() -> None:
    skills = [torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    found = cosine_distances(torch.tensor([[5.0, 0.0], [3.0, 3.0], [-1.0, 0.0]]), skills)
    half = 1 - math.sqrt(0.5)
    assert torch.allclose(found, torch.tensor([[0.0, 1.0], [half, half], [2.0, 1.0]], dtype=torch.float64))


def test_the_covariance_is_shrunk_by_the_formula() -> None:
    rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    # sample: diag(2, 0.5), mean variance 1.25, spread 2 * 0.75^2 = 1.125
    # noise: ((16 + 16 + 1 + 1) / 4 - (4 + 0.25)) / 4 = 1.0625; shrinkage 1.0625 / 1.125 = 17 / 18
    wanted = 17 / 18 * 1.25 * torch.eye(2) + 1 / 18 * torch.diag(torch.tensor([2.0, 0.5]))
    assert torch.allclose(shrunk_covariance(rows), wanted.double())


def test_with_many_rows_the_covariance_is_that_of_the_sample() -> None:
    scale = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    rows = torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ scale
    rows -= rows.mean(dim=0)
    assert torch.allclose(shrunk_covariance(rows), rows.T @ rows / len(rows), atol=1e-2)


def test_mahalanobis_counts_standard_deviations_of_the_common_scatter() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(5_000, 2, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1.0])
    skills = [noise[:2500] - noise[:2500].mean(dim=0), noise[2500:] - noise[2500:].mean(dim=0) + 10]
    found = mahalanobis_distances(torch.tensor([[6.0, 0.0], [0.0, 2.0], [10.0, 10.0]]), skills)
    assert torch.allclose(found[:2, 0], torch.tensor([2.0, 2.0], dtype=torch.float64), rtol=0.05)
    assert found[2, 1] == pytest.approx(0.0, abs=1e-6)


def test_equal_examples_have_distances() -> None:
    same = torch.ones(4, 3)
    found = mahalanobis_distances(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0]]), [same])
    assert torch.allclose(found[:, 0], torch.tensor([0.0, 2.0], dtype=torch.float64))


def test_a_threshold_contains_the_known_share() -> None:
    distances = torch.arange(101, dtype=torch.float64)
    threshold = calibrated_threshold(distances, 0.95)
    assert threshold == pytest.approx(95) and (distances <= threshold).sum() == 96


def test_auroc() -> None:
    assert auroc([1, 2, 3], [4, 5]) == 1.0
    assert auroc([4, 5], [1, 2, 3]) == 0.0
    # of six pairs: 2 > 1, 2 = 2 counts half, 2 < 3; 3 > 1, 3 > 2, 3 = 3 counts half
    assert auroc([1, 2, 3], [2, 3]) == pytest.approx((1 + 0.5 + 1 + 1 + 0.5) / 6)
    with pytest.raises(ValueError, match="none"):
        auroc([], [1.0])


def test_router_entropy_is_a_fraction_of_the_maximum() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert torch.allclose(router_entropy(weights), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    assert router_entropy(torch.ones(3, 1)).tolist() == [0.0, 0.0, 0.0]
