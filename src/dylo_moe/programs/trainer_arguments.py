"""From the training flags to ``transformers.TrainingArguments``: what is ours, what follows, what is passed on."""

from typing import Any

import torch
from transformers import TrainingArguments

from dylo_moe.config import TrainFlags, TrainingArgumentsGroup
from dylo_moe.errors import ConfigError, first_line
from dylo_moe.flags import split_names
from dylo_moe.training.trackers import resolve_trackers

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)
"""The field of ``TrainingArguments`` that saves memory by recomputing; transformers 5.23 renamed it."""

_SCHEDULER_TYPES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def trainer_arguments(flags: TrainFlags) -> TrainingArguments:
    """The arguments of the Trainer; what is passed on comes before what would be chosen here.

    Where several processes were launched, this joins them.

    Raises:
        ConfigError: They do not go together, or one of them is out of its range.
    """
    args, given = flags.training, flags.passed_on.given
    if "lr_scheduler_type" in given and args.schedule is not None:
        raise ConfigError(
            f"--lr_scheduler_type must be left out where --lr_strategy is given ({args.schedule}), "
            f"got {given['lr_scheduler_type']}"
        )
    options = {**_ours(args), "report_to": _trackers(flags), **_intervals(given), **given}
    strategies = options["eval_strategy"], options["save_strategy"]
    judged = "no" not in strategies
    if judged and strategies[1] not in ("best", strategies[0]):
        raise ConfigError(
            "--eval_strategy must be as --save_strategy, unless one of them is no, since the best checkpoint is one "
            f"that was evaluated; got {strategies[0]} and {strategies[1]} (a number of steps means steps)"
        )
    if args.early_stopping_patience is not None and not judged:
        raise ConfigError("--early_stopping_patience must be left out where nothing is evaluated or saved in training")
    try:
        return TrainingArguments(load_best_model_at_end=judged, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the training flags cannot be used: {first_line(error)}") from error


def _ours(args: TrainingArgumentsGroup) -> dict[str, Any]:
    accelerated = torch.accelerator.is_available()
    return {
        "output_dir": args.output_dir,
        "num_train_epochs": args.num_epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.train_batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        # cosine_restarts is the trainer's own; this one is then not used
        "lr_scheduler_type": _SCHEDULER_TYPES.get(args.schedule or "cosine", "cosine"),
        "warmup_steps": args.warmup_ratio,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "label_smoothing_factor": args.label_smoothing,
        "bf16": args.bf16,
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        CHECKPOINTING: args.gradient_checkpointing,
        "logging_steps": args.logging_steps,
        "save_total_limit": args.save_total_limit,
        "metric_for_best_model": "mean_domain_loss",
        "greater_is_better": False,
        # the patience that is used up must survive an interruption
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # each parameter has a gradient in each forward, and the buffers are made equal where they change
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "logging_nan_inf_filter": False,  # it would log a mean where the loss is not finite; monitoring ends the run
        "seed": args.seed,
    }


def _trackers(flags: TrainFlags) -> list[str]:
    trackers = resolve_trackers(split_names(flags.training.report_to))
    return [*trackers, *(["wandb"] if flags.uses_wandb and "wandb" not in trackers else [])]


def _intervals(given: dict[str, Any]) -> dict[str, Any]:
    """When to evaluate and to save: each epoch, or where a number of steps is given for either, both in steps."""
    for what in ("eval", "save"):
        strategy = given.get(f"{what}_strategy", "steps")
        if f"{what}_steps" in given and strategy != "steps":
            raise ConfigError(f"--{what}_steps must be left out where --{what}_strategy is {strategy}")
    steps = given.get("eval_steps", given.get("save_steps"))
    if steps is not None:
        return {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": steps, "save_steps": steps}
    alike = {given.get("eval_strategy"), given.get("save_strategy")} & {"steps", "epoch"}
    usual = alike.pop() if len(alike) == 1 else "epoch"
    return {"eval_strategy": usual, "save_strategy": usual}
