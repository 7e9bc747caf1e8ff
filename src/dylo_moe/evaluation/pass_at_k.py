"""pass@k with its error and intervals, as pure functions over counts. Every score is a fraction from 0 to 1."""

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_Z = 1.959964
"""Half the width of a 95% interval in standard errors of a normal distribution."""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: 1 - C(n - c, k) / C(n, k).

    That is the probability that at least one of ``k`` samples of a task passes. Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", equation 1.

    Args:
        samples: Number of samples, n; at least ``k``.
        passed: Number of samples that passed, c.
        k: Number of samples to draw.
    """
    assert 0 <= passed <= samples and 1 <= k <= samples
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean over tasks, one value each; 0 for a single task, where it is unknown."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def wilson_interval(share: float, tasks: int) -> tuple[float, float]:
    """Return a 95% interval of the fraction of tasks that pass (Wilson 1927).

    It has a width also where none or all of them pass. For means of per-task fractions it is wider than necessary.
    """
    spread = _Z * math.sqrt(share * (1 - share) / tasks + (_Z / (2 * tasks)) ** 2)
    middle, scale = share + _Z**2 / (2 * tasks), 1 + _Z**2 / tasks
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def paired_bootstrap(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return a 95% percentile interval of the mean difference ``after - before`` over the same tasks.

    Tasks are drawn with replacement, both scores of a task together (Efron & Tibshirani 1993, chapter 13).
    """
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
