"""What a stream of skills left behind, as pure functions of a matrix.

``matrix[i, j]`` is what was measured on skill j after learning skill i, skills counted in the order of the stream; it
is square. Entries that a function does not read may be NaN: above the diagonal only ``forward_transfer`` reads any.
Measures are accuracies, where more is better, or with ``lower_is_better`` losses. Results keep the sense of their
name either way: more transfer is good, more forgetting is bad.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def average_performance(matrix: ArrayLike) -> float:
    """Mean over all skills after the last one, in the unit of the matrix.

    ACC of Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", equation 2.
    """
    return float(_square(matrix, at_least=1)[-1].mean())


def backward_transfer(matrix: ArrayLike, *, lower_is_better: bool = False) -> float:
    """How much better the older skills are at the end than right after they were learned; negative where forgotten.

    BWT of Lopez-Paz and Ranzato 2017, equation 3: the mean over all skills but the last.
    """
    values = _square(matrix, at_least=2)
    return float(_sign(lower_is_better) * (values[-1] - values.diagonal())[:-1].mean())


def forgetting(matrix: ArrayLike, *, lower_is_better: bool = False) -> float:
    """How much worse the older skills are at the end than at their best before; negative where they only got better.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", equation 3: the mean, over all skills but the
    last, of the best from its own stage to the last but one, less the end.
    """
    values = _sign(lower_is_better) * _square(matrix, at_least=2)
    last = len(values) - 1
    best = np.array([values[skill:last, skill].max() for skill in range(last)])
    return float((best - values[-1, :last]).mean())


def relative_forgetting(matrix: ArrayLike, *, lower_is_better: bool = False) -> list[float]:
    """For each skill but the last, how much worse it is at the end than when it was learned, as a fraction of that.

    Raises:
        ValueError: A skill measured 0 after it was learned, or the matrix is no matrix.
    """
    values = _square(matrix, at_least=2)
    learned = values.diagonal()[:-1]
    if not learned.all():
        raise ValueError(f"nothing is a fraction of 0, which skill {int(np.flatnonzero(learned == 0)[0])} measured")
    worse = -_sign(lower_is_better) * (values[-1, :-1] - learned)
    return [float(value) for value in worse / np.abs(learned)]


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike, *, lower_is_better: bool = False) -> float:
    """How much better skills are just before they are learned than in the untrained model.

    FWT of Lopez-Paz and Ranzato 2017, equation 4: the mean over all skills but the first.

    Args:
        matrix: With ``matrix[j - 1, j]`` measured.
        untrained: ``(skills,)``, the same measure of the model before the first skill.
        lower_is_better: Whether the measure is a loss.
    """
    values, before = _square(matrix, at_least=2), np.asarray(untrained, dtype=np.float64)
    if before.shape != (len(values),):
        raise ValueError(f"untrained must have one number for each of {len(values)} skills, got shape {before.shape}")
    return float(_sign(lower_is_better) * (values.diagonal(offset=1) - before[1:]).mean())


def routing_accuracy(weights: ArrayLike, expert: ArrayLike, example: ArrayLike) -> tuple[float, float]:
    """How often the right expert has the largest weight, per token and per example.

    An example goes to the expert with the largest sum of weights over its tokens. Where several are largest, the first
    is taken, as in routing.

    Args:
        weights: ``(tokens, experts)``, routing weights of real tokens.
        expert: ``(tokens,)``, the right one for each.
        example: ``(tokens,)``, which example each belongs to: any integers. All tokens of one have the same expert.

    Returns:
        Two fractions from 0 to 1.
    """
    shares, right, member = np.asarray(weights, dtype=np.float64), np.asarray(expert), np.asarray(example)
    if shares.ndim != 2 or not len(shares) or right.shape != shares.shape[:1] or member.shape != shares.shape[:1]:
        raise ValueError(
            f"weights must be (tokens, experts) and the others (tokens,), got {shares.shape}, {right.shape} and "
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
        raise ValueError(f"the matrix must be square, of at least {at_least} skills, got shape {values.shape}")
    return values
