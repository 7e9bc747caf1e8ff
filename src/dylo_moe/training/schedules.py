"""The learning-rate schedule that transformers lacks: cosine cycles that warm up again.

transformers' ``cosine_with_restarts`` warms up once, and then jumps to the peak at every restart. A warm restart
after a jump disturbs what the optimiser's averages hold, so here each cycle begins as the first does.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

CYCLES = 2


def warm_restarts(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Cosine annealing with restarts (SGDR, Loshchilov and Hutter 2016, arXiv 1608.03983), ``CYCLES`` of equal length.

    Args:
        optimizer: Each of its groups has its own peak.
        num_warmup_steps: Of all cycles together.
        num_training_steps: Of all cycles together.
    """
    factor = partial(
        restarted_cosine, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, cycles=CYCLES
    )
    return LambdaLR(optimizer, factor)


def restarted_cosine(step: int, *, num_warmup_steps: int, num_training_steps: int, cycles: int) -> float:
    """The share of the peak at a step, 0 to 1: in each cycle up along a line, and down along half a cosine."""
    if step >= num_training_steps:
        return 0.0
    length, warmup = num_training_steps / cycles, num_warmup_steps / cycles
    place = step % length
    if place < warmup:
        return place / warmup
    return 0.5 * (1 + math.cos(math.pi * (place - warmup) / (length - warmup)))
