"""Where a training run goes on from, and what must not be in its way."""

from pathlib import Path

from rich.console import Console

from dylo_moe.config import AUTO_RESUME, LATEST, TrainConfig
from dylo_moe.errors import CheckpointError, ConfigError
from dylo_moe.training import checkpoints
from dylo_moe.training.fetching import fetched_checkpoint, went_on_from


def resume_folder(flags: TrainConfig, console: Console) -> str | None:
    """The checkpoint to go on from; None to begin anew, in a folder that has no checkpoints of another run.

    Raises:
        DyLoRAError: There is none where one is wanted, it is not whole, or another run's are in the way.
    """
    output, wanted = Path(flags.training.output_dir), flags.training.resume_from_checkpoint
    artifact, overwrite = flags.wandb.wandb_checkpoint_artifact, flags.training.overwrite_output_dir
    if artifact is not None:
        if wanted not in (None, LATEST, AUTO_RESUME):
            raise ConfigError(f"--wandb_checkpoint_artifact goes on from there, and not from {wanted}; leave one out")
        if not went_on_from(artifact, output):
            old = _in_the_way(output, overwrite)
            console.print(f"Fetching {artifact}", highlight=False, soft_wrap=True)
            in_place = flags.training.save_in_place
            return str(fetched_checkpoint(artifact, output, replacing=old, in_place=in_place))
        wanted = LATEST
    if wanted is None:
        for folder in _in_the_way(output, overwrite):
            checkpoints.remove(folder)
        return None
    if wanted in (LATEST, AUTO_RESUME):
        return _newest(flags, console, or_anew=wanted == AUTO_RESUME)
    if not Path(wanted).is_dir():
        raise ConfigError(f"--resume_from_checkpoint: there is no folder {wanted}")
    checkpoints.check(Path(wanted))
    return wanted


def _newest(flags: TrainConfig, console: Console, *, or_anew: bool) -> str | None:
    output = Path(flags.training.output_dir)
    for folder in checkpoints.unfinished(output):
        console.print(f"Skipping {folder}: it was not finished", highlight=False, soft_wrap=True)
    checkpoints.recover(output, in_place=flags.training.save_in_place)
    newest, skipped = checkpoints.newest_whole(output)
    for folder, wrong in skipped:
        console.print(f"Skipping {folder}: {wrong}", highlight=False, soft_wrap=True)
    if newest is not None:
        console.print(f"Going on from {newest}", highlight=False, soft_wrap=True)
        return str(newest)
    if skipped:
        raise CheckpointError(f"--resume_from_checkpoint: no checkpoint in {output} is whole; see the lines above")
    if or_anew:
        return None
    raise ConfigError(f"--resume_from_checkpoint: {output} holds no checkpoint yet; name its folder, or say auto")


def _in_the_way(output: Path, overwrite: bool) -> list[Path]:
    """Checkpoints of an earlier run: they cannot share a folder with a new one's, which would be resumed from them."""
    old = checkpoints.newest_first(output)
    if old and not overwrite:
        raise ConfigError(
            f"--output_dir {output} holds checkpoints of an earlier run, {old[0].name} and others; go on with "
            "--resume_from_checkpoint, choose another folder, or remove them by --overwrite_output_dir"
        )
    return old
