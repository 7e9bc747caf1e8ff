"""A learning-rate schedule that transformers lacks: cosine cycles that each warm up.

transformers' ``cosine_with_restarts`` warms up once, then jumps to the peak at every restart. Such a jump disturbs the
optimizer's running averages, so here every cycle begins like the first one.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_CYCLES = 2


def warm_restarts(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Return a schedule of ``_CYCLES`` equal cosine cycles (SGDR, Loshchilov and Hutter 2016, arXiv 1608.03983).

    Args:
        optimizer: The optimizer; each of its groups has its own peak.
        num_warmup_steps: Number of warm-up steps, all cycles together.
        num_training_steps: Number of steps, all cycles together.
    """
    factor = partial(
        restarted_cosine, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, cycles=_CYCLES
    )
    return LambdaLR(optimizer, factor)


def restarted_cosine(step: int, *, num_warmup_steps: int, num_training_steps: int, cycles: int) -> float:
    """Return the share of the peak rate at a step, 0 to 1: each cycle rises linearly, then falls as half a cosine."""
    if step >= num_training_steps:
        return 0.0
    length, warmup = num_training_steps / cycles, num_warmup_steps / cycles
    position = step % length
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (length - warmup)))
