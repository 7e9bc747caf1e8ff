"""Measures of whether a dataset is a known skill, as pure functions of embeddings and routing weights.

An embedding is ``(hidden_size,)``: the mean over an example's tokens of the base's normalized hidden states. Distances
are to the mean embedding of a skill, by the cosine or, after Lee et al. 2018 ("A Simple Unified Framework for Detecting
Out-of-Distribution Samples"), by Mahalanobis with one covariance for all skills. There are more dimensions than
examples, so the covariance is shrunk as in Ledoit and Wolf 2004.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

Distances = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Function of ``(n, hidden)`` embeddings, and of those of each of k skills, that returns ``(n, k)`` distances."""


def cosine_distances(embeddings: Tensor, skills: Sequence[Tensor]) -> Tensor:
    """Return one minus the cosine between each embedding and the mean of each skill.

    Args:
        embeddings: Embeddings of examples, ``(n, hidden)``.
        skills: Embeddings of each of the k skills, ``(n_k, hidden)``.

    Returns:
        ``(n, k)`` float64, from 0 to 2.
    """
    means = F.normalize(_means(skills), dim=-1)
    cosines: Tensor = F.normalize(embeddings.double(), dim=-1) @ means.T
    return 1 - cosines


def mahalanobis_distances(embeddings: Tensor, skills: Sequence[Tensor]) -> Tensor:
    """Return distances in standard deviations of the scatter within the skills; see ``cosine_distances``."""
    means = _means(skills)
    within = torch.cat([skill.double() - mean for skill, mean in zip(skills, means, strict=True)])
    factor = torch.linalg.cholesky(shrunk_covariance(within))
    apart = embeddings.double()[:, None] - means
    whitened = torch.linalg.solve_triangular(factor, apart.flatten(0, 1).T, upper=False)
    distances: Tensor = torch.linalg.vector_norm(whitened, dim=0)
    return distances.view(apart.shape[:2])


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Return the covariance of rows with mean 0, shrunk towards a multiple of the identity.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.2.

    Args:
        centred: Rows with mean 0, ``(n, p)``.

    Returns:
        Covariance, ``(p, p)``; the identity if all rows are 0.
    """
    rows, width = centred.shape
    sample = centred.T @ centred / rows
    identity = torch.eye(width, dtype=centred.dtype)
    mean = sample.trace() / width
    if mean == 0:
        return identity
    spread = (sample - mean * identity).square().sum()
    noise = (centred.square().sum(dim=1).square().sum() / rows - sample.square().sum()) / rows
    # rows that are equal up to their sign have no noise and a covariance of rank one; keep it invertible
    shrinkage = torch.where(spread > 0, noise / spread, 1.0).clamp(min=torch.finfo(centred.dtype).eps ** 0.5, max=1.0)
    return shrinkage * mean * identity + (1 - shrinkage) * sample


def calibrated_threshold(distances: Tensor, known_share: float) -> float:
    """Return the distance that contains the fraction ``known_share`` of a skill's held-out examples."""
    return float(torch.quantile(distances.double(), known_share))


def auroc(known: ArrayLike, novel: ArrayLike) -> float:
    """Return the probability that a novel score is above a known one, with ties counted half; 0.5 is chance.

    The area under the ROC curve, as the Mann-Whitney statistic (Hanley and McNeil 1982).

    Raises:
        ValueError: There are no known or no novel scores.
    """
    below, above = np.sort(np.asarray(known, dtype=np.float64)), np.asarray(novel, dtype=np.float64)
    if not below.size or not above.size:
        raise ValueError("`known` and `novel` must each hold at least one score, and one holds none")
    ranks = np.searchsorted(below, above, side="left") + np.searchsorted(below, above, side="right")
    return float(ranks.mean() / (2 * below.size))


def router_entropy(weights: Tensor) -> Tensor:
    """Return the entropy of routing weights as a fraction of its maximum, from 0 to 1.

    Args:
        weights: Routing weights, ``(..., experts)``.

    Returns:
        Entropy, ``(...,)``: 1 for equal weights, and 0 for a single expert.
    """
    if weights.shape[-1] == 1:
        return torch.zeros_like(weights[..., 0])
    wide = weights.double()
    entropy: Tensor = torch.special.entr(wide).sum(dim=-1)
    return entropy / math.log(weights.shape[-1])


def _means(skills: Sequence[Tensor]) -> Tensor:
    return torch.stack([skill.double().mean(dim=0) for skill in skills])
