"""Build ``transformers.TrainingArguments`` from the flags of ``train``."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from dylo_moe.config import TrainArgs, TrainConfig, split_names
from dylo_moe.errors import ConfigError, first_line
from dylo_moe.training import resolve_trackers

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)
"""Name of the field of ``TrainingArguments`` that turns on recomputation; transformers 5.23 renamed it."""

_SCHEDULER_TYPES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def make_trainer_arguments(flags: TrainConfig) -> TrainingArguments:
    """Return the arguments of the trainer; fields that the user passes through override the ones chosen here.

    In a launch of several processes, this also joins the process group.

    Raises:
        ConfigError: Flags contradict each other, or one of them is out of range.
    """
    args, given = flags.training, flags.passthrough.given
    if "lr_scheduler_type" in given and args.schedule is not None:
        raise ConfigError(
            f"--lr_scheduler_type must be left out where --lr_strategy is given ({args.schedule}), "
            f"got {given['lr_scheduler_type']}"
        )
    trackers = resolve_trackers(split_names(args.report_to))
    if flags.uses_wandb and "wandb" not in trackers:
        trackers = [*trackers, "wandb"]
    options: dict[str, Any] = {**_own_options(args), "report_to": trackers, **_intervals(given), **given}
    eval_strategy, save_strategy = options["eval_strategy"], options["save_strategy"]
    picks_best = "no" not in (eval_strategy, save_strategy)
    if picks_best and save_strategy not in ("best", eval_strategy):
        raise ConfigError(
            "--eval_strategy must be as --save_strategy, unless one of them is no, since only an evaluated checkpoint "
            f"can be the best; got {eval_strategy} and {save_strategy} (a number of steps means steps)"
        )
    if args.early_stopping_patience is not None and not picks_best:
        raise ConfigError("--early_stopping_patience must be left out where nothing is evaluated or saved in training")
    try:
        return TrainingArguments(load_best_model_at_end=picks_best, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the training flags cannot be used: {first_line(error)}") from error


def _own_options(args: TrainArgs) -> dict[str, object]:
    """Return the arguments that this package sets, by field of ``TrainingArguments``."""
    accelerated = torch.accelerator.is_available()
    return {
        "output_dir": args.output_dir,
        "num_train_epochs": args.num_epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.train_batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        # unused with cosine_restarts, which the trainer builds itself
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
        # an interruption must not reset the patience of early stopping
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # every parameter gets a gradient, and buffers are synchronized where they change
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "logging_nan_inf_filter": False,  # monitoring must see losses that are not finite
        "seed": args.seed,
    }


def _intervals(given: Mapping[str, object]) -> dict[str, object]:
    """Return when to evaluate and save: both every epoch by default, both in steps if either has a number of steps.

    Raises:
        ConfigError: A number of steps contradicts the strategy.
    """
    for event in ("eval", "save"):
        strategy = given.get(f"{event}_strategy", "steps")
        if f"{event}_steps" in given and strategy != "steps":
            raise ConfigError(f"--{event}_steps must be left out where --{event}_strategy is {strategy}")
    steps = given.get("eval_steps", given.get("save_steps"))
    if steps is not None:
        return {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": steps, "save_steps": steps}
    chosen = {given.get("eval_strategy"), given.get("save_strategy")} & {"steps", "epoch"}
    strategy = chosen.pop() if len(chosen) == 1 else "epoch"
    return {"eval_strategy": strategy, "save_strategy": strategy}
