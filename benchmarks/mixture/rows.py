"""What an arm does on each held-out row."""

import torch

from benchmarks.mixture.arms import Arm
from benchmarks.mixture.setting import Batch, answer_losses, answers_of, answers_only, inputs_of


@torch.no_grad()
def measured_rows(arm: Arm, batch: Batch, task: int) -> list[list[float]]:
    """Return for each row the summed loss in nats, the answer's tokens, and the loss of its first token.

    For an arm with routes, also the number of tokens that are routed right, and the summed loss of those.
    """
    extra = arm.extra(batch, task)
    with answers_only(arm.model, batch):
        output = arm.model(**inputs_of(batch), **extra)
    losses, answers = answer_losses(output.logits, batch), answers_of(batch)
    right = None
    if arm.routes is not None:
        right = (arm.routes(extra, output).expand_as(answers)[answers] == task).to(losses)
    rows = answers.nonzero()[:, 0]
    found = []
    for row in range(len(answers)):
        own = losses[rows == row]
        values = [float(own.sum()), len(own), float(own[0])]
        if right is not None:
            of_row = right[rows == row]
            values += [float(of_row.sum()), float((own * of_row).sum())]
        found.append([round(value, 4) for value in values])
    return found
