"""The configuration: every flag of every program, its default, its check and its help text.

A flag comes from the command line, from the file that ``--config`` names, or from its default, in that order;
``flags.py`` reads them; those of the model are in ``model_config.py``, of benchmarks in ``benchmark_config.py``.
Everything a program needs is in these dataclasses; nothing below the programs sees them.
"""

import math
import os
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from dylo_moe.acquire_config import AcquireArguments, ExpertsArguments, GrowingExpertArguments
from dylo_moe.benchmark_config import BenchmarkArguments, LiveBenchmarkArguments
from dylo_moe.cloud_config import SubmitArguments
from dylo_moe.flags import flag as _flag
from dylo_moe.flags import names_of, split_names
from dylo_moe.flags import require as _require
from dylo_moe.model_config import ExpertArguments, ModelArguments
from dylo_moe.trainer_fields import PassedOn, other_fields

LATEST, AUTO_RESUME = "latest", "auto"
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class SourceArguments:
    """Where datasets are read from, for every program that reads some."""

    data_dir: str | None = _flag(
        default=None, help="Folder to find datasets in: NAME.jsonl and the like, NAME/, or a datasets cache."
    )
    skip_bad_rows: bool = _flag(default=False, help="Leave out rows that cannot be used, and count them.")


@dataclass
class DataArguments(SourceArguments):
    """What to train on."""

    _argument_group_name: ClassVar[str] = "data"

    datasets: str = _flag(
        default="code_alpaca,mbpp",
        help="Datasets, comma-separated: names (see dylora-moe datasets), or name=path for your own files.",
    )
    training_subset: float = _flag(default=100.0, help="Percent of the training rows to use, chosen at random.")
    eval_subset: float = _flag(default=100.0, help="Percent of the held-out rows to use, chosen at random.")
    interleaved_sampling: bool = _flag(
        default=False, help="Equal shares of all datasets; small ones repeat. Proportional otherwise."
    )
    mixing_temperature: float = _flag(
        default=1.0, help="Shares are proportional to size^(1/T): 1 is proportional, above it small sets get more."
    )
    max_seq_length: int = _flag(default=1024, help="Most tokens of an example, and of a packed row.")
    packing: bool = _flag(default=True, help="Join short training examples into full rows; they do not see each other.")
    overlong: str = _flag(
        default="cut", help="Longer examples lose the end of their response (cut) or are left out (drop)."
    )
    template: str = _flag(
        default="auto",
        help="Around conversations: the model's own (chat), Alpaca's (plain), or auto: chat if it has one.",
    )
    decontaminate: bool = _flag(default=True, help="Leave out rows that are tasks of HumanEval(+) or MBPP(+).")
    preprocessing_workers: int | None = _flag(
        default=None, help="Processes to tokenise with; as many as there are cores if not given."
    )

    def __post_init__(self) -> None:
        _require(bool(self.names), "datasets", "at least one dataset name", repr(self.datasets))
        plain = [name.partition("=")[0] for name in self.names]
        twice = sorted({name for name in plain if plain.count(name) > 1})
        _require(not twice, "datasets", "different datasets", f"{', '.join(twice)} more than once")
        for flag in ("training_subset", "eval_subset"):
            value = getattr(self, flag)
            _require(0 < value <= 100, flag, "a percentage above 0 and up to 100", value)
        _require(self.mixing_temperature >= 1, "mixing_temperature", "1 or more", self.mixing_temperature)
        both = self.interleaved_sampling and self.mixing_temperature != 1
        _require(
            not both, "mixing_temperature", "left out where --interleaved_sampling is given", self.mixing_temperature
        )
        _require(self.max_seq_length >= 8, "max_seq_length", "at least 8 tokens", self.max_seq_length)
        _require(self.overlong in ("cut", "drop"), "overlong", "cut or drop", repr(self.overlong))
        _require(self.template in ("auto", "chat", "plain"), "template", "auto, chat or plain", repr(self.template))
        workers = self.preprocessing_workers
        _require(workers is None or workers >= 1, "preprocessing_workers", "at least 1", workers)

    @property
    def temperature(self) -> float:
        """The mixing temperature; equal shares are what an infinite one gives."""
        return math.inf if self.interleaved_sampling else self.mixing_temperature

    @property
    def workers(self) -> int:
        """``preprocessing_workers``, resolved."""
        return self.preprocessing_workers or len(os.sched_getaffinity(0))

    @property
    def names(self) -> list[str]:
        """The datasets, in order."""
        return split_names(self.datasets)


@dataclass
class TrainingArgumentsGroup:
    """How to train."""

    _argument_group_name: ClassVar[str] = "training"

    num_epochs: float = _flag(default=3.0, aliases=["--num_train_epochs"], help="Passes over the training data.")
    max_steps: int = _flag(default=-1, help="Optimiser steps, in the place of --num_epochs; -1 for no limit.")
    train_batch_size: int = _flag(
        default=2,
        aliases=["--per_device_train_batch_size"],
        help="Examples per device in one forward.",
    )
    gradient_accumulation_steps: int = _flag(default=32, help="Forwards per optimiser step.")
    eval_batch_size: int = _flag(
        default=8,
        aliases=["--per_device_eval_batch_size"],
        help="Examples per device in one evaluation forward.",
    )
    learning_rate: float = _flag(default=2e-4, help="Peak learning rate.")
    router_learning_rate: float | None = _flag(default=None, help="The router's own; as --learning_rate if not given.")
    lr_strategy: str | None = _flag(
        default=None, help="After the warm-up: constant, linear, cosine (if not given) or cosine_restarts (two cycles)."
    )
    cosine_restarts: bool = _flag(default=False, help="Short for --lr_strategy cosine_restarts.")
    warmup_ratio: float = _flag(default=0.03, help="Share of the steps in which the learning rate rises.")
    weight_decay: float = _flag(default=0.0, help="AdamW's weight decay.")
    max_grad_norm: float = _flag(default=1.0, help="Gradients are clipped to this norm.")
    label_smoothing: float = _flag(
        default=0.0,
        aliases=["--label_smoothing_factor"],
        help="Share of each target spread over the vocabulary.",
    )
    bf16: bool = _flag(default=False, help="Base model and activations in bfloat16; experts stay in float32.")
    gradient_checkpointing: bool = _flag(
        default=False, aliases=["--activation_checkpointing"], help="Less memory, more time."
    )
    early_stopping_patience: int | None = _flag(
        default=None, help="Stop after this many evaluations without a lower mean loss over the domains."
    )
    logging_steps: int = _flag(default=10, help="Steps between two log entries.")
    report_to: str = _flag(
        default="auto",
        help="Trackers, comma-separated: tensorboard, wandb, mlflow, trackio; none; or auto: tensorboard if installed.",
    )
    save_total_limit: int = _flag(default=2, help="Checkpoints to keep, the newest and the best among them.")
    seed: int = _flag(default=42, help="Seed of everything random but the data splits, which never move.")
    output_dir: str = _flag(default="./results", help="Where checkpoints, logs and best_model go.")
    overwrite_output_dir: bool = _flag(default=False, help="Remove the checkpoints of an earlier run in --output_dir.")
    save_in_place: bool = _flag(
        default=False,
        help="Write checkpoints and the mixture under their own names and rename no folder, for --output_dir on object "
        "storage.",
    )
    save_minutes: float | None = _flag(
        default=None, help="Also save a checkpoint whenever so many minutes have passed since the last one."
    )
    resume_from_checkpoint: str | None = _flag(
        default=None,
        help="Go on from this checkpoint folder, or from the newest whole one in --output_dir if no folder is named; "
        "'auto' begins anew where there is none.",
        nargs="?",
        const=LATEST,
    )

    def __post_init__(self) -> None:
        _require(self.num_epochs > 0, "num_epochs", "above 0", self.num_epochs)
        _require(self.max_steps == -1 or self.max_steps > 0, "max_steps", "-1 or at least 1", self.max_steps)
        for flag in ("train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "logging_steps"):
            _require(getattr(self, flag) >= 1, flag, "at least 1", getattr(self, flag))
        _require(
            self.save_total_limit >= 2,
            "save_total_limit",
            "at least 2, the newest checkpoint and one to fall back to",
            self.save_total_limit,
        )
        _require(self.save_minutes is None or self.save_minutes > 0, "save_minutes", "above 0", self.save_minutes)
        fresh = not (self.overwrite_output_dir and self.resume_from_checkpoint)
        _require(fresh, "overwrite_output_dir", "left out where --resume_from_checkpoint is given", "both")
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        for flag, lowest in (("router_learning_rate", 0), ("early_stopping_patience", 1)):
            value = getattr(self, flag)
            _require(value is None or value >= lowest, flag, f"{lowest} or more", value)
        self._check_schedule()
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", "from 0 up to but not including 1", self.warmup_ratio)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.max_grad_norm > 0, "max_grad_norm", "above 0", self.max_grad_norm)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", "from 0 up to 1", self.label_smoothing)
        trackers = split_names(self.report_to)
        known = trackers in (["auto"], ["none"]) or (bool(trackers) and set(trackers) <= set(TRACKERS))
        _require(known, "report_to", f"auto, none or some of {', '.join(TRACKERS)}", repr(self.report_to))

    def _check_schedule(self) -> None:
        allowed = (None, *SCHEDULES)
        _require(self.lr_strategy in allowed, "lr_strategy", f"one of {', '.join(SCHEDULES)}", repr(self.lr_strategy))
        _require(
            not self.cosine_restarts or self.lr_strategy in (None, "cosine_restarts"),
            "cosine_restarts",
            "left out where --lr_strategy is another one",
            f"--lr_strategy {self.lr_strategy} with it",
        )

    @property
    def schedule(self) -> str | None:
        """The learning-rate schedule that was asked for; None where none was."""
        return "cosine_restarts" if self.cosine_restarts else self.lr_strategy


@dataclass
class WandbArguments:
    """What goes to Weights & Biases, and comes from there."""

    _argument_group_name: ClassVar[str] = "Weights & Biases"

    wandb_project: str | None = _flag(
        default=None, help="Log the run to this project; WANDB_PROJECT or dylora-moe if only other W&B flags are given."
    )
    wandb_entity: str | None = _flag(default=None, help="User or team of the project.")
    wandb_run_name: str | None = _flag(default=None, help="Name of the run; W&B invents one if not given.")
    wandb_log_model: bool = _flag(default=False, help="Upload checkpoints and the best model as artifacts.")
    wandb_checkpoint_artifact: str | None = _flag(
        default=None,
        help="Go on from this checkpoint, and its run: user/project/artifact:v0, or folder:PATH/artifact:v0.",
    )

    @property
    def enabled(self) -> bool:
        """Whether one of these flags asks for a run on W&B."""
        artifact = self.wandb_checkpoint_artifact
        fetched = artifact is not None and not artifact.startswith("folder:")
        named = self.wandb_project or self.wandb_entity or self.wandb_run_name
        return bool(named or self.wandb_log_model or fetched)


@dataclass
class RunArguments:
    """How to run the program itself."""

    _argument_group_name: ClassVar[str] = "run"

    config: str | None = _flag(default=None, help="YAML file with any of these flags; the command line wins.")
    dry_run: bool = _flag(default=False, help="Print the resolved configuration and stop.")


@dataclass
class GenerateArguments:
    """What to generate, and with what."""

    _argument_group_name: ClassVar[str] = "generation"

    trained_model: str = _flag(default="./results/best_model", help="Checkpoint folder, or a Hub id.")
    base_model: str | None = _flag(
        default=None, help="Where its base model is now, a folder or Hub id; where the checkpoint says if not given."
    )
    prompt: str | None = _flag(default=None, help="Text to go on from; read from standard input if not given.")
    instruction: str | None = _flag(
        default=None, help="A task in words, put into the template of the instruction datasets."
    )
    expert: str | None = _flag(default=None, help="Use this expert alone, in the place of the mixture.")
    base_only: bool = _flag(default=False, help="Use the base model without any expert.")
    max_new_tokens: int = _flag(default=128, help="Most tokens to generate.")
    temperature: float = _flag(default=0.0, help="0 is greedy; above, sampling.")
    top_p: float = _flag(default=1.0, help="Sample from the smallest set of tokens with this probability.")
    num_beams: int = _flag(default=1, help="Beams of a beam search; 1 for none.")
    seed: int = _flag(default=42, help="Seed for sampling.")

    def __post_init__(self) -> None:
        _require(
            self.prompt is None or self.instruction is None, "prompt", "left out where --instruction is given", "both"
        )
        _require(not (self.base_only and self.expert), "expert", "left out where --base_only is given", self.expert)
        _require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        _require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and up to 1", self.top_p)
        _require(self.num_beams >= 1, "num_beams", "at least 1", self.num_beams)
        _require(
            self.num_beams == 1 or self.temperature == 0,
            "num_beams",
            "1 where --temperature is above 0",
            self.num_beams,
        )


@dataclass
class DatasetsArguments(SourceArguments):
    """What to list."""

    _argument_group_name: ClassVar[str] = "datasets"

    datasets: str | None = _flag(
        default=None, help="Read these, as train would, and show what is in them; without it, list what there is."
    )

    @property
    def names(self) -> list[str]:
        """The datasets, in order."""
        return split_names(self.datasets or "")


_NAMED = (
    ModelArguments,
    ExpertArguments,
    DataArguments,
    TrainingArgumentsGroup,
    WandbArguments,
    LiveBenchmarkArguments,
    RunArguments,
)
_OTHER = other_fields(name for group in _NAMED for name in names_of(group))

TRAIN_GROUPS = (*_NAMED[:4], _OTHER, *_NAMED[4:])
ACQUIRE_GROUPS = (
    AcquireArguments,
    *(GrowingExpertArguments if group is ExpertArguments else group for group in TRAIN_GROUPS),
)


class TrainFlags(NamedTuple):
    """All flags of ``train``, parsed, in the order of ``TRAIN_GROUPS``."""

    model: ModelArguments
    experts: ExpertArguments
    data: DataArguments
    training: TrainingArgumentsGroup
    passed_on: PassedOn
    wandb: WandbArguments
    benchmark: LiveBenchmarkArguments
    run: RunArguments

    @property
    def uses_wandb(self) -> bool:
        """Whether the run is logged to W&B: a flag of W&B's is given, or it is among the trackers."""
        return self.wandb.enabled or "wandb" in split_names(self.training.report_to)


class AcquireFlags(NamedTuple):
    """All flags of ``acquire``, parsed: its own, and those of the training of each skill."""

    acquire: AcquireArguments
    train: TrainFlags


EXPERTS_GROUPS = (ExpertsArguments,)
GENERATE_GROUPS = (GenerateArguments,)
BENCHMARK_GROUPS = (BenchmarkArguments,)
DATASETS_GROUPS = (DatasetsArguments,)
SUBMIT_GROUPS = (SubmitArguments,)
