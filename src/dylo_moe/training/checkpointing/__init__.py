"""Checkpoints that are complete or absent, and runs that resume from them bit for bit."""

from dylo_moe.training.checkpointing import checkpoints
from dylo_moe.training.checkpointing.interruption import EvaluationInterrupted, InterruptionCallback, StopRequest
from dylo_moe.training.checkpointing.resumable_trainer import ResumableTrainer

__all__ = [
    "EvaluationInterrupted",
    "InterruptionCallback",
    "ResumableTrainer",
    "StopRequest",
    "checkpoints",
]
