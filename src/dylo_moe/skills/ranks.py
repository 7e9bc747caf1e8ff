"""How large an expert a body of data needs."""

BITS_PER_PARAMETER = 2.0
"""What a transformer keeps of facts that it is trained on, per parameter: Allen-Zhu and Li 2024, "Physics of Language
Models: Part 3.3, Knowledge Capacity Scaling Laws"."""

BITS_PER_TOKEN = 1.0
"""What a token has to say: a rule of thumb, that of Schulman et al. 2025, "LoRA Without Regret"."""

SMALLEST = 4


def rank_for(labelled_tokens: int, parameters_per_rank: float, largest: int) -> int:
    """The smallest power of two at which an expert can hold what its data says.

    Schulman et al. 2025 find a LoRA to learn as quickly as the whole model does until its capacity is used up, so
    that a larger rank than this buys nothing, and a smaller one costs.

    Args:
        labelled_tokens: Training tokens with a loss.
        parameters_per_rank: How many parameters each rank adds to an expert.
        largest: A bound.
    """
    wanted = labelled_tokens * BITS_PER_TOKEN / (parameters_per_rank * BITS_PER_PARAMETER)
    rank = SMALLEST
    while rank < min(wanted, largest):
        rank *= 2
    return min(rank, largest)
