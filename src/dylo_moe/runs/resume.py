"""Find the checkpoint that a training run resumes from, and refuse to mix two runs in one folder."""

from pathlib import Path

from rich.console import Console

from dylo_moe.config import AUTO_RESUME, LATEST, TrainConfig
from dylo_moe.errors import CheckpointError, ConfigError
from dylo_moe.training import checkpoints, fetch_checkpoint, was_resumed_from


def resume_folder(flags: TrainConfig, console: Console) -> str | None:
    """Return the checkpoint to resume from, or None for a new run in a folder without checkpoints.

    Raises:
        DyLoRAError: The requested checkpoint is missing or incomplete, or the output folder holds another run.
    """
    output, requested = Path(flags.training.output_dir), flags.training.resume_from_checkpoint
    artifact, overwrite = flags.wandb.wandb_checkpoint_artifact, flags.training.overwrite_output_dir
    if artifact is not None:
        if requested not in (None, LATEST, AUTO_RESUME):
            raise ConfigError(
                f"--wandb_checkpoint_artifact must be left out where --resume_from_checkpoint is {requested}"
            )
        if not was_resumed_from(artifact, output):
            old = _old_checkpoints(output, overwrite)
            console.print(f"Fetching {artifact}", highlight=False, soft_wrap=True)
            in_place = flags.training.save_in_place
            return str(fetch_checkpoint(artifact, output, replacing=old, in_place=in_place))
        requested = LATEST
    if requested is None:
        for folder in _old_checkpoints(output, overwrite):
            checkpoints.remove(folder)
        return None
    if requested in (LATEST, AUTO_RESUME):
        return _newest_checkpoint(flags, console, required=requested == LATEST)
    if not Path(requested).is_dir():
        raise ConfigError(f"--resume_from_checkpoint: there is no folder {requested}")
    checkpoints.check(Path(requested))
    return requested


def _newest_checkpoint(flags: TrainConfig, console: Console, *, required: bool) -> str | None:
    """Return the newest complete checkpoint of the output folder; None if there is none and none is required."""
    output = Path(flags.training.output_dir)
    for folder in checkpoints.unfinished(output):
        console.print(f"Skipping {folder}: it was not finished", highlight=False, soft_wrap=True)
    checkpoints.recover(output, in_place=flags.training.save_in_place)
    newest, skipped = checkpoints.newest_whole(output)
    for folder, problem in skipped:
        console.print(f"Skipping {folder}: {problem}", highlight=False, soft_wrap=True)
    if newest is not None:
        console.print(f"Resuming from {newest}", highlight=False, soft_wrap=True)
        return str(newest)
    if skipped:
        raise CheckpointError(f"--resume_from_checkpoint: no checkpoint in {output} is complete; see the lines above")
    if not required:
        return None
    raise ConfigError(f"--resume_from_checkpoint: {output} holds no checkpoint; give a checkpoint's folder, or auto")


def _old_checkpoints(output: Path, overwrite: bool) -> list[Path]:
    """Return the checkpoints of an earlier run, which a new run must replace.

    A new run that kept them could later resume from them by mistake.

    Raises:
        ConfigError: There are some, and they may not be overwritten.
    """
    old = checkpoints.newest_first(output)
    if old and not overwrite:
        raise ConfigError(
            f"--output_dir {output} holds checkpoints of an earlier run, such as {old[0].name}; resume with "
            "--resume_from_checkpoint, choose another folder, or remove them with --overwrite_output_dir"
        )
    return old
