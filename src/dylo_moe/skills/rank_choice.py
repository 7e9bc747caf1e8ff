"""Rank of an expert by the amount of its training data."""

_BITS_PER_PARAMETER = 2.0
"""Knowledge capacity of a transformer, after Allen-Zhu and Li 2024, "Physics of Language Models: Part 3.3, Knowledge
Capacity Scaling Laws"."""

_BITS_PER_TOKEN = 1.0
"""Information in a token, a rule of thumb of Schulman et al. 2025, "LoRA Without Regret"."""

_SMALLEST = 4


def rank_for(labelled_tokens: int, parameters_per_rank: float, largest: int) -> int:
    """Return the smallest power of two at which an expert has the capacity for its training data.

    Schulman et al. 2025 find that a LoRA learns as fast as the whole model until its capacity is used up, so a larger
    rank gains nothing and a smaller one loses.

    Args:
        labelled_tokens: Number of training tokens with a loss.
        parameters_per_rank: Number of parameters that each rank adds to an expert.
        largest: Upper bound of the rank.
    """
    needed = labelled_tokens * _BITS_PER_TOKEN / (parameters_per_rank * _BITS_PER_PARAMETER)
    rank = _SMALLEST
    while rank < min(needed, largest):
        rank *= 2
    return min(rank, largest)
