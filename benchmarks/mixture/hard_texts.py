"""Texts that are hard for routes: some change their task half way, some are of a task that no adapter learned."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F

from benchmarks.mixture.arms import Arm, Setting, composed
from benchmarks.mixture.rows import measured_rows
from benchmarks.mixture.setting import Batch
from benchmarks.mixture.study import Study
from benchmarks.mixture.tasks import Task
from dylo_moe.core import IGNORE_INDEX

Rows = dict[str, list[list[float]]]

SWITCHED_BATCHES = 1
"""Batches of each task that get the text of another task before them."""


def losses_after_a_switch(study: Study, arm: Arm, tasks: Sequence[Task]) -> Rows:
    """Return what an arm does on each task's answers when a whole example of another task stands before them.

    An arm that is told the adapters of rows (``oracle``) uses that of the second task for the whole text.
    """
    found = {}
    for (_, before), (index, task) in pairwise([*enumerate(tasks), (0, tasks[0])]):
        first, second = (study.batches(one, dev=False)[:SWITCHED_BATCHES] for one in (before, task))
        found[task.name] = [
            row for a, b in zip(first, second, strict=True) for row in measured_rows(arm, joined(a, b), index)
        ]
    return found


def joined(before: Batch, after: Batch) -> Batch:
    """Return rows that hold a row of one batch and then a row of another, with the labels of the latter."""
    number = min(len(before["input_ids"]), len(after["input_ids"]))
    rows = []
    for index in range(number):
        parts = [
            {name: batch[name][index][batch["attention_mask"][index] > 0] for name in batch}
            for batch in (before, after)
        ]
        parts[0]["labels"] = torch.full_like(parts[0]["labels"], IGNORE_INDEX)
        rows.append({name: torch.cat([part[name] for part in parts]) for name in before})
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.stack([F.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])
        for name, value in filler.items()
    }


def _real(batch: Batch, row: int) -> Batch:
    """Return a row without its padding."""
    return {name: values[row][batch["attention_mask"][row] > 0] for name, values in batch.items()}


def losses_of_unknown_tasks(study: Study, setting: Setting) -> dict[str, dict[str, list[list[float]]]]:
    """Return what a mixture of all other adapters does on the rows of each task, and where it sends the tokens."""
    names = setting.names
    found = {}
    for index, name in enumerate(names):
        known = setting.without(name)
        arm = Arm(composed(known)[0])
        found[name] = [
            row for batch in study.batches(study.tasks[index], dev=False) for row in measured_rows(arm, batch, 0)
        ]
    return found
