"""Tests of the continual-learning metrics against hand-worked matrices."""

import math

import pytest

from dylo_moe.skills.continual_metrics import (
    average_performance,
    backward_transfer,
    forgetting,
    forward_transfer,
    relative_forgetting,
    routing_accuracy,
)

ACCURACY = [
    [0.80, 0.20, 0.10],
    [0.90, 0.60, 0.30],
    [0.70, 0.50, 0.90],
]
LOSS = [
    [2.0, math.nan, math.nan],
    [1.5, 1.0, math.nan],
    [2.5, 1.1, 3.0],
]


def test_metrics_of_accuracies() -> None:
    assert average_performance(ACCURACY) == pytest.approx((0.7 + 0.5 + 0.9) / 3)
    # (0.7 - 0.8) and (0.5 - 0.6)
    assert backward_transfer(ACCURACY) == pytest.approx(-0.1)
    # the first skill was best after the second one: (0.9 - 0.7) and (0.6 - 0.5)
    assert forgetting(ACCURACY) == pytest.approx(0.15)
    assert relative_forgetting(ACCURACY) == pytest.approx([0.1 / 0.8, 0.1 / 0.6])
    # (0.2 - 0.1) and (0.3 - 0.4)
    assert forward_transfer(ACCURACY, [0.0, 0.1, 0.4]) == pytest.approx(0.0)
    assert forward_transfer(ACCURACY, [0.0, 0.1, 0.1]) == pytest.approx(0.15)


def test_metrics_of_losses_have_the_same_signs_and_need_no_upper_half() -> None:
    assert average_performance(LOSS) == pytest.approx(2.2)
    # (2.0 - 2.5) and (1.0 - 1.1): worse, so negative
    assert backward_transfer(LOSS, lower_is_better=True) == pytest.approx(-0.3)
    # best of the first was 1.5
    assert forgetting(LOSS, lower_is_better=True) == pytest.approx((1.0 + 0.1) / 2)
    assert relative_forgetting(LOSS, lower_is_better=True) == pytest.approx([0.25, 0.1])
    whole = [[2.0, 4.0], [2.0, 1.0]]
    assert forward_transfer(whole, [9.0, 5.0], lower_is_better=True) == pytest.approx(1.0)


def test_improvement_is_negative_forgetting() -> None:
    assert forgetting([[0.5, 0.0], [0.7, 0.6]]) == pytest.approx(-0.2)
    assert relative_forgetting([[4.0, 0.0], [3.0, 1.0]], lower_is_better=True) == pytest.approx([-0.25])


@pytest.mark.parametrize("wrong", [[], [1.0, 2.0], [[1.0, 2.0]], [[1.0]]])
def test_a_matrix_that_is_not_square_or_too_small_is_refused(wrong: list[object]) -> None:
    for measure in (backward_transfer, forgetting, relative_forgetting):
        with pytest.raises(ValueError, match="square"):
            measure(wrong)


def test_a_fraction_of_zero_and_a_wrong_baseline_are_refused() -> None:
    with pytest.raises(ValueError, match="skill 0"):
        relative_forgetting([[0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="untrained"):
        forward_transfer(ACCURACY, [0.1])


def test_routing_accuracy_per_token_and_per_example() -> None:
    weights = [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.5, 0.5], [0.1, 0.9]]
    expert = [0, 0, 1, 1, 1]
    example = [7, 7, 3, 3, 5]
    # tokens: right, wrong, right, wrong (a tie goes to the first), right
    # examples: 7 by 1.3 to 0.7, 3 by 0.7 to 1.3, 5 by 0.1 to 0.9, all right
    assert routing_accuracy(weights, expert, example) == pytest.approx((3 / 5, 1.0))
    assert routing_accuracy([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], [1, 1, 0], [0, 0, 1]) == pytest.approx((1 / 3, 0.0))


def test_an_example_of_two_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="same expert"):
        routing_accuracy([[1.0, 0.0], [0.0, 1.0]], [0, 1], [2, 2])
    with pytest.raises(ValueError, match="tokens"):
        routing_accuracy([[1.0, 0.0]], [0, 1], [0, 0])
