"""The arguments of the trainer: defaults, fields that are passed through, and contradictions."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from dylo_moe.config.commands import TrainConfig
from dylo_moe.config.parser import parse
from dylo_moe.errors import ConfigError
from dylo_moe.runs.trainer_arguments import make_trainer_arguments


def parse_arguments(tmp_path: Path, *flags: str) -> TrainingArguments:
    words = ["--output_dir", str(tmp_path), "--report_to", "none", *flags]
    return make_trainer_arguments(parse(TrainConfig, "train", "", words))


def test_passed_through_fields_override_defaults(tmp_path: Path) -> None:
    defaults = parse_arguments(tmp_path)
    assert (defaults.adam_beta2, defaults.warmup_steps, defaults.logging_nan_inf_filter) == (0.999, 0.03, False)
    flags = ["--adam_beta2", "0.95", "--warmup_steps", "7", "--report_to", "tensorboard", "--optim", "sgd"]
    args = parse_arguments(tmp_path, *flags, "--dataloader_num_workers", "2", "--disable_tqdm", "true")
    assert (args.adam_beta2, args.warmup_steps, args.report_to) == (0.95, 7, ["tensorboard"])
    assert (args.optim, args.dataloader_num_workers, args.disable_tqdm) == ("sgd", 2, True)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], "cosine"),
        (["--lr_strategy", "cosine"], "cosine"),
        (["--lr_strategy", "linear"], "linear"),
        (["--lr_strategy", "constant"], "constant_with_warmup"),
        (["--lr_scheduler_type", "polynomial"], "polynomial"),
    ],
)
def test_the_schedule_is_the_requested_one(tmp_path: Path, flags: list[str], wanted: str) -> None:
    assert parse_arguments(tmp_path, *flags).lr_scheduler_type == wanted


@pytest.mark.parametrize(
    ("flags", "evaluates", "saves", "best"),
    [
        ([], ("epoch", None), ("epoch", 500), True),
        (["--save_steps", "50"], ("steps", 50), ("steps", 50), True),
        (["--eval_steps", "25"], ("steps", 25), ("steps", 25), True),
        (["--eval_steps", "25", "--save_steps", "50"], ("steps", 25), ("steps", 50), True),
        (["--save_strategy", "no"], ("epoch", None), ("no", 500), False),
        (["--eval_strategy", "no", "--save_steps", "5"], ("no", 5), ("steps", 5), False),
        (["--save_strategy", "best"], ("epoch", None), ("best", 500), True),
    ],
)
def test_evaluation_and_saving_use_one_strategy(
    tmp_path: Path, flags: list[str], evaluates: tuple[str, int], saves: tuple[str, int], best: bool
) -> None:
    args = parse_arguments(tmp_path, *flags)
    assert (args.eval_strategy, args.eval_steps) == evaluates
    assert (args.save_strategy, args.save_steps) == saves
    assert args.load_best_model_at_end is best
    assert (args.metric_for_best_model, args.greater_is_better) == ("mean_domain_loss", False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr_scheduler_type", "polynomial", "--cosine_restarts"], "--lr_scheduler_type must be left out where"),
        (["--lr_scheduler_type", "square"], "square is not a valid SchedulerType"),
        (
            ["--save_steps", "5", "--save_strategy", "epoch"],
            "--save_steps must be left out where --save_strategy is epoch",
        ),
        (["--save_steps", "5", "--eval_strategy", "epoch"], "--eval_strategy must be as --save_strategy"),
        (["--eval_steps", "50", "--save_steps", "75"], "round multiple of the evaluation"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "--early_stopping_patience must be left out"),
        (["--optim", "magic"], "magic is not a valid OptimizerNames"),
        (["--fp16", "--bf16"], "At most one of fp16 and bf16"),
    ],
)
def test_contradicting_flags_are_a_one_line_error(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_arguments(tmp_path, *flags)
    assert "\n" not in str(raised.value)
