"""Stores of checkpoints and mixtures: a folder, or W&B."""

from dylo_moe.training.artifacts import wandb_store
from dylo_moe.training.artifacts.fetch import fetch_checkpoint, fetch_mixture, store_of, was_resumed_from
from dylo_moe.training.artifacts.store import ArtifactCallback

__all__ = [
    "ArtifactCallback",
    "fetch_checkpoint",
    "fetch_mixture",
    "store_of",
    "wandb_store",
    "was_resumed_from",
]
