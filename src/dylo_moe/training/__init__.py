"""Training: the Trainer, checkpoints that survive interruptions, monitoring and artifacts."""

from dylo_moe.training.artifacts import (
    ArtifactCallback,
    fetch_checkpoint,
    fetch_mixture,
    store_of,
    wandb_store,
    was_resumed_from,
)
from dylo_moe.training.callbacks import BaseEvaluation, TokenProgressCallback
from dylo_moe.training.checkpointing import InterruptionCallback, StopRequest, checkpoints
from dylo_moe.training.distributed import broadcast_from_main, first_non_none
from dylo_moe.training.monitoring import monitoring_callbacks, resolve_trackers
from dylo_moe.training.trainer import DyLoRATrainer

__all__ = [
    "ArtifactCallback",
    "BaseEvaluation",
    "DyLoRATrainer",
    "InterruptionCallback",
    "StopRequest",
    "TokenProgressCallback",
    "broadcast_from_main",
    "checkpoints",
    "fetch_checkpoint",
    "fetch_mixture",
    "first_non_none",
    "monitoring_callbacks",
    "resolve_trackers",
    "store_of",
    "wandb_store",
    "was_resumed_from",
]
