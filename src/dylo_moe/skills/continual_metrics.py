"""Metrics of continual learning, as pure functions of a matrix of measurements.

``matrix[i, j]`` is the measurement on skill j after learning skill i, in the order of learning; the matrix is square.
Entries that a function does not read may be NaN: above the diagonal only ``forward_transfer`` reads any. Measurements
are accuracies, where more is better, or losses with ``lower_is_better``. The signs of the results do not depend on it:
more transfer is good, more forgetting is bad.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def average_performance(matrix: ArrayLike) -> float:
    """Return the mean over all skills after the last one was learned, in the unit of the matrix.

    ACC of Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", equation 2.
    """
    return float(_square(matrix, at_least=1)[-1].mean())


def backward_transfer(matrix: ArrayLike, *, lower_is_better: bool = False) -> float:
    """Return the mean gain of all skills but the last from right after learning to the end; negative if forgotten.

    BWT of Lopez-Paz and Ranzato 2017, equation 3.
    """
    values = _square(matrix, at_least=2)
    return float(_sign(lower_is_better) * (values[-1] - values.diagonal())[:-1].mean())


def forgetting(matrix: ArrayLike, *, lower_is_better: bool = False) -> float:
    """Return the mean decline of all skills but the last from their best before to the end; negative if all improved.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", equation 3: the best measurement of a skill from
    its own stage to the last but one, less the measurement at the end.
    """
    values = _sign(lower_is_better) * _square(matrix, at_least=2)
    last = len(values) - 1
    best = np.array([values[skill:last, skill].max() for skill in range(last)])
    return float((best - values[-1, :last]).mean())


def relative_forgetting(matrix: ArrayLike, *, lower_is_better: bool = False) -> list[float]:
    """Return for each skill but the last how much worse it got after it was learned, as a fraction.

    Raises:
        ValueError: The measurement of a skill right after it was learned is 0, or the matrix is not square.
    """
    values = _square(matrix, at_least=2)
    learned = values.diagonal()[:-1]
    if not learned.all():
        raise ValueError(
            f"`matrix` must not be 0 on its diagonal, got 0 for skill {int(np.flatnonzero(learned == 0)[0])}"
        )
    worse = -_sign(lower_is_better) * (values[-1, :-1] - learned)
    return [float(value) for value in worse / np.abs(learned)]


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike, *, lower_is_better: bool = False) -> float:
    """Return the mean gain of all skills but the first over the untrained model, just before they are learned.

    FWT of Lopez-Paz and Ranzato 2017, equation 4.

    Args:
        matrix: Measurements, including each ``matrix[j - 1, j]``.
        untrained: Measurements of the model before the first skill: ``(skills,)``.
        lower_is_better: Whether the measurements are losses.
    """
    values, before = _square(matrix, at_least=2), np.asarray(untrained, dtype=np.float64)
    if before.shape != (len(values),):
        raise ValueError(f"`untrained` must have one number for each of {len(values)} skills, got shape {before.shape}")
    return float(_sign(lower_is_better) * (values.diagonal(offset=1) - before[1:]).mean())


def routing_accuracy(weights: ArrayLike, expert: ArrayLike, example: ArrayLike) -> tuple[float, float]:
    """Return the fractions of tokens and of examples whose right expert has the largest weight.

    An example goes to the expert with the largest sum of weights over its tokens. Of equal weights the first is the
    largest, as in routing.

    Args:
        weights: Routing weights of real tokens: ``(tokens, experts)``.
        expert: Number of the right expert of each token: ``(tokens,)``.
        example: Number of the example that each token belongs to, any integers: ``(tokens,)``. All tokens of an example
            have the same expert.

    Returns:
        Two fractions from 0 to 1.

    Raises:
        ValueError: The shapes do not fit, or the tokens of an example have different experts.
    """
    shares, right, member = np.asarray(weights, dtype=np.float64), np.asarray(expert), np.asarray(example)
    if shares.ndim != 2 or not len(shares) or right.shape != shares.shape[:1] or member.shape != shares.shape[:1]:
        raise ValueError(
            f"`weights` must be (tokens, experts) and the others (tokens,), got {shares.shape}, {right.shape} and "
            f"{member.shape}"
        )
    per_token = float((shares.argmax(axis=1) == right).mean())
    _, first, number = np.unique(member, return_index=True, return_inverse=True)
    if (right[first][number] != right).any():
        raise ValueError("all tokens of an example must have the same expert")
    sums = np.zeros((len(first), shares.shape[1]))
    np.add.at(sums, number, shares)
    return per_token, float((sums.argmax(axis=1) == right[first]).mean())


def _sign(lower_is_better: bool) -> float:
    return -1.0 if lower_is_better else 1.0


def _square(matrix: ArrayLike, at_least: int) -> Matrix:
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < at_least:
        raise ValueError(f"`matrix` must be square, of at least {at_least} skills, got shape {values.shape}")
    return values
