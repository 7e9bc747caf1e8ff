"""Tests of the parts of benchmarks/mixture that need no model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.mixture.answers import rouge_l, split
from benchmarks.mixture.hard_texts import joined
from benchmarks.mixture.setting import Batch, Results, answer_losses, answers_of, best_on_ladder
from benchmarks.mixture.together_table import difference

LADDER = [1.0, 2.0, 4.0, 8.0, 16.0]


def batch_of(rows: list[tuple[list[int], int]]) -> Batch:
    """Return rows of ids, whose first so many are the prompt, padded on the right with 0."""
    longest = max(len(ids) for ids, _ in rows)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in rows]
    labels = [[-100] * prompt + ids[prompt:] + [-100] * (longest - len(ids)) for ids, prompt in rows]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
    values = {"input_ids": padded, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize(("best", "start"), [(2.0, 1), (8.0, 1), (4.0, 3), (2.0, 3)])
def test_the_search_stops_where_both_neighbours_are_worse(best: float, start: int) -> None:
    asked = []

    def measure(value: float) -> float:
        asked.append(value)
        return abs(np.log2(value / best))

    assert best_on_ladder(LADDER, start, measure) == best
    place = LADDER.index(best)
    assert {LADDER[place - 1], LADDER[place + 1]} <= set(asked)


@pytest.mark.parametrize("best", [1.0, 16.0])
def test_a_best_value_at_the_end_is_refused(best: float) -> None:
    with pytest.raises(ValueError, match="widen the ladder"):
        best_on_ladder(LADDER, 2, lambda value: abs(np.log2(value / best)))


def test_losses_are_of_the_positions_before_each_answer_token() -> None:
    batch = batch_of([([5, 6, 7, 8], 2), ([5, 6, 7], 1)])
    assert answers_of(batch).tolist() == [[False, True, True, False], [True, True, False, False]]
    logits = torch.zeros(2, 4, 9)
    logits[0, 1, 7] = logits[0, 2, 8] = logits[1, 0, 6] = 50.0  # sure of all answers but the last one
    losses = answer_losses(logits[answers_of(batch)], batch)
    assert losses.tolist() == pytest.approx([0, 0, 0, np.log(9)], abs=1e-5)


def test_joined_rows_hold_both_texts_and_only_the_second_answer() -> None:
    first, second = batch_of([([1, 2, 3], 1), ([4], 0)]), batch_of([([5, 6], 1), ([7, 8, 9], 2)])
    both = joined(first, second)
    assert both["input_ids"].tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 0]]
    assert both["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert both["labels"].tolist() == [[-100, -100, -100, -100, 6], [-100, -100, -100, 9, -100]]


def test_prompts_are_padded_on_the_left() -> None:
    prompts, answers = split(batch_of([([1, 2, 3], 2), ([4, 5], 1)]), pad=0)
    assert prompts["input_ids"].tolist() == [[1, 2], [0, 4]]
    assert prompts["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert [answer.tolist() for answer in answers] == [[3], [5]]


@pytest.mark.parametrize(
    ("written", "right", "score"),
    [("The cat sat.", "the cat sat", 1.0), ("a b c d", "b d e", 4 / 7), ("no", "yes", 0.0), ("", "", 1.0)],
)
def test_rouge_l(written: str, right: str, score: float) -> None:
    assert rouge_l(written, right) == pytest.approx(score)


def test_the_difference_of_two_arms_and_its_interval() -> None:
    random = np.random.default_rng(0)

    def run(factor: float) -> dict[str, dict[str, list[list[float]]]]:
        rows = {name: random.uniform(1, 2, 40) for name in ("a", "b")}
        return {"tasks": {name: [[factor * loss, 1.0] for loss in losses] for name, losses in rows.items()}}

    better = [run(0.9) for _ in range(3)]
    reference = [
        {"tasks": {n: [[loss / 0.9, c] for loss, c in rows] for n, rows in one["tasks"].items()}} for one in better
    ]
    middle, low, high = difference(better, reference, same_tasks=True)
    assert (middle, low, high) == pytest.approx((-0.1, -0.1, -0.1))
    middle, low, high = difference([run(1.0)], [run(1.0)], same_tasks=False)
    assert low < middle < high
    assert low < 0 < high


def test_results_go_on_where_they_stopped(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert Results(path, {"machine": "m"}).run("a", lambda: (1, 2)) == [1, 2]
    again = Results(path, {"machine": "other"})
    assert again.run("a", lambda: pytest.fail("measured twice")) == [1, 2]
    assert again.content["environment"] == {"machine": "m"}
