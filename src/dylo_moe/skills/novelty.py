"""Is this body of text a skill that is known already? Pure functions of embeddings, and of routing weights.

An embedding is ``(hidden_size,)``: the mean over an example's tokens of the base's normalised hidden states. Distances
are to the mean embedding of a skill, by the cosine or, after Lee et al. 2018 ("A Simple Unified Framework for Detecting
Out-of-Distribution Samples"), by Mahalanobis with one covariance that all skills share. There are more dimensions than
examples, so that the covariance is shrunk as Ledoit and Wolf 2004 do.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

Distances = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""From ``(n, hidden)`` embeddings, and those of each of k skills, to ``(n, k)`` distances."""


def cosine_distances(embeddings: Tensor, skills: Sequence[Tensor]) -> Tensor:
    """One less the cosine between each embedding and the mean of each skill.

    Args:
        embeddings: ``(n, hidden)``.
        skills: Embeddings of each of the k skills, ``(n_k, hidden)``.

    Returns:
        ``(n, k)`` float64, from 0 to 2.
    """
    means = F.normalize(_means(skills), dim=-1)
    cosines: Tensor = F.normalize(embeddings.double(), dim=-1) @ means.T
    return 1 - cosines


def mahalanobis_distances(embeddings: Tensor, skills: Sequence[Tensor]) -> Tensor:
    """Distances in standard deviations of the scatter within the skills; arguments as for ``cosine_distances``."""
    means = _means(skills)
    within = torch.cat([skill.double() - mean for skill, mean in zip(skills, means, strict=True)])
    factor = torch.linalg.cholesky(shrunk_covariance(within))
    apart = embeddings.double()[:, None] - means
    whitened = torch.linalg.solve_triangular(factor, apart.flatten(0, 1).T, upper=False)
    distances: Tensor = torch.linalg.vector_norm(whitened, dim=0)
    return distances.view(apart.shape[:2])


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Covariance of ``(n, p)`` rows whose mean is 0, shrunk towards a multiple of the identity: ``(p, p)``.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.2. Where
    all rows are 0, the identity.
    """
    rows, width = centred.shape
    sample = centred.T @ centred / rows
    identity = torch.eye(width, dtype=centred.dtype)
    mean = sample.trace() / width
    if mean == 0:
        return identity
    spread = (sample - mean * identity).square().sum()
    noise = (centred.square().sum(dim=1).square().sum() / rows - sample.square().sum()) / rows
    # rows that are all alike up to their sign have no noise, and a covariance of rank one: keep it invertible
    shrinkage = torch.where(spread > 0, noise / spread, 1.0).clamp(min=torch.finfo(centred.dtype).eps ** 0.5, max=1.0)
    return shrinkage * mean * identity + (1 - shrinkage) * sample


def calibrated_threshold(distances: Tensor, known_share: float) -> float:
    """The distance within which ``known_share`` of a skill's own held-out examples lie."""
    return float(torch.quantile(distances.double(), known_share))


def auroc(known: ArrayLike, novel: ArrayLike) -> float:
    """Probability that a novel score is above a known one, ties counted half; 0.5 is chance.

    The area under the ROC curve, as the Mann-Whitney statistic (Hanley and McNeil 1982).
    """
    below, above = np.sort(np.asarray(known, dtype=np.float64)), np.asarray(novel, dtype=np.float64)
    if not below.size or not above.size:
        raise ValueError("an AUROC needs known and novel scores, and there are none of one kind")
    ranks = np.searchsorted(below, above, side="left") + np.searchsorted(below, above, side="right")
    return float(ranks.mean() / (2 * below.size))


def router_entropy(weights: Tensor) -> Tensor:
    """Entropy of routing weights as a share of the largest there can be: ``(..., experts)`` to ``(...,)``, 0 to 1.

    1 says that the router has no opinion; with a single expert it never has another one, and the entropy is 0.
    """
    if weights.shape[-1] == 1:
        return torch.zeros_like(weights[..., 0])
    wide = weights.double()
    entropy: Tensor = torch.special.entr(wide).sum(dim=-1)
    return entropy / math.log(weights.shape[-1])


def _means(skills: Sequence[Tensor]) -> Tensor:
    return torch.stack([skill.double().mean(dim=0) for skill in skills])
