"""pass@k and its intervals, checked against hand-worked numbers."""

import itertools

import numpy as np
import pytest

from dylo_moe.evaluation.pass_at_k import paired_bootstrap, pass_at_k, standard_error, wilson_interval


@pytest.mark.parametrize(
    ("samples", "passed", "k", "expected"),
    [(1, 0, 1, 0.0), (1, 1, 1, 1.0), (10, 3, 1, 0.3), (4, 2, 2, 1 - 1 / 6), (5, 1, 5, 1.0), (200, 1, 100, 0.5)],
)
def test_pass_at_k_equals_hand_worked_numbers(samples: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_passing_sample() -> None:
    for samples, passed, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if passed > samples or k > samples:
            continue
        choices = list(itertools.combinations(range(samples), k))
        share = sum(any(one < passed for one in choice) for choice in choices) / len(choices)
        assert pass_at_k(samples, passed, k) == pytest.approx(share)


def test_pass_at_k_is_unbiased_where_one_minus_a_power_is_not() -> None:
    rate, samples, k = 0.3, 6, 3
    passed = np.random.default_rng(0).binomial(samples, rate, size=20_000)
    truth = 1 - (1 - rate) ** k
    assert np.mean([pass_at_k(samples, int(one), k) for one in passed]) == pytest.approx(truth, abs=0.01)
    assert abs(np.mean(1 - (1 - passed / samples) ** k) - truth) > 0.02


def test_the_standard_error_is_of_the_mean_over_tasks() -> None:
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([1.0]) == 0.0


def test_wilsons_interval() -> None:
    # 81 of 263, from Newcombe 1998, table I, method 3
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson_interval(0.0, 164)
    assert low == 0.0 and 0.02 < high < 0.03
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_the_paired_bootstrap_uses_the_pairing() -> None:
    random = np.random.default_rng(1)
    before = random.integers(0, 2, size=200).astype(float)
    after = before.copy()
    after[:20] = 1 - after[:20]
    low, high = paired_bootstrap(before.tolist(), after.tolist())
    difference = float((after - before).mean())
    assert low <= difference <= high and high - low < 0.1
    unpaired_low, unpaired_high = paired_bootstrap(before.tolist(), random.permutation(after).tolist())
    assert unpaired_high - unpaired_low > 2 * (high - low)
    # as the normal approximation has it
    error = float((after - before).std(ddof=1)) / 200**0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert paired_bootstrap([0.0, 1.0], [0.0, 1.0]) == (0.0, 0.0)
