"""Linear discriminant: which of several tasks a text is of, in closed form and as probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.skills.novelty import shrunk_covariance


class Discriminant(NamedTuple):
    """Linear discriminant: the softmax of ``features @ weight.T + bias`` is the probability of each task.

    Attributes:
        weight: ``(tasks, width)`` float64.
        bias: ``(tasks,)`` float64.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits, from ``(..., width)`` to ``(..., tasks)`` float64."""
        return features.double() @ self.weight.T + self.bias


def solve_discriminant(tasks: Sequence[Tensor]) -> Discriminant:
    """Return the discriminant of tasks whose texts scatter alike around their means, all tasks equally likely.

    Fisher 1936, "The use of multiple measurements in taxonomic problems", with the covariance within the tasks shrunk
    as ``shrunk_covariance`` says, because there are fewer texts than their features are wide.

    Args:
        tasks: Features of each task's examples, one row an example: ``(examples, width)``.
    """
    means = torch.stack([examples.double().mean(dim=0) for examples in tasks])
    within = torch.cat([examples.double() - mean for examples, mean in zip(tasks, means, strict=True)])
    weight = torch.linalg.solve(shrunk_covariance(within), means.T).T
    return Discriminant(weight, -(weight * means).sum(dim=1) / 2)
