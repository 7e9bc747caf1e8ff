"""Tests of the rank by the amount of data, against hand-worked numbers."""

import pytest

from dylo_moe.skills.rank_choice import rank_for


@pytest.mark.parametrize(
    ("tokens", "per_rank", "largest", "rank"),
    [
        (10, 1000, 64, 4),  # the smallest
        (16_000, 1000, 64, 8),  # 16,000 bits in 2,000 bits a rank
        (16_001, 1000, 64, 16),
        (10**9, 1000, 64, 64),
        (10**9, 1000, 48, 48),  # a bound that is not a power of two
        (10, 1000, 2, 2),
    ],
)
def test_the_rank_is_the_smallest_sufficient_power_of_two(
    tokens: int, per_rank: float, largest: int, rank: int
) -> None:
    assert rank_for(tokens, per_rank, largest) == rank
