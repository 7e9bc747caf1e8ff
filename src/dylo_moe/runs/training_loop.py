"""A training run from its start or its checkpoint to its end, or to the signal that stops it."""

from contextlib import closing
from pathlib import Path

from rich.console import Console
from transformers import EarlyStoppingCallback

from dylo_moe.config import TrainConfig
from dylo_moe.training import (
    DyLoRATrainer,
    InterruptionCallback,
    StopRequest,
    TokenProgressCallback,
    checkpoints,
    first_non_none,
)


def run_training(trainer: DyLoRATrainer, flags: TrainConfig, resume_from: str | None, console: Console) -> bool:
    """Train until the end, or until a signal stops the run.

    Args:
        trainer: The trainer; gets the callbacks for progress, signals and early stopping.
        flags: The flags of the run.
        resume_from: Checkpoint to resume from; None to start at the first step.
        console: Receives the message about a stop.

    Returns:
        Whether training finished. If not, a checkpoint to resume from is on disk.
    """
    args, progress, request = flags.training, TokenProgressCallback(), StopRequest()
    if not trainer.args.disable_tqdm:
        trainer.add_callback(progress)
    trainer.add_callback(InterruptionCallback(request, trainer.accelerator, args.save_minutes))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    with closing(progress), request.listening():
        trainer.train(resume_from_checkpoint=resume_from)
    stopped_by = first_non_none(request.signal)
    if stopped_by is None:
        return True
    saved = checkpoints.folder_of(Path(args.output_dir), trainer.state.global_step)
    console.print(f"Stopped by {stopped_by.name}; saved {saved}. Resume with --resume_from_checkpoint", highlight=False)
    return False
