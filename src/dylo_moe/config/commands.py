"""The flags of data, training and generation, and the configuration of each program.

A flag comes from the command line, from the file that ``--config`` names, or from its default, in that order;
``parser.py`` reads them. Everything a program needs is in these dataclasses; nothing below the programs sees them.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dylo_moe.config.cloud import SubmitArgs
from dylo_moe.config.composition import ComposeArgs
from dylo_moe.config.evaluation import BenchmarkArgs, LiveBenchmarkArgs
from dylo_moe.config.model import ExpertArgs, ModelArgs
from dylo_moe.config.parser import GROUP, Group, flag, names_of, require, split_names
from dylo_moe.config.skills import AcquireArgs, ExpertsArgs, GrowingExpertArgs
from dylo_moe.config.trainer_fields import PassthroughArgs, other_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LATEST, AUTO_RESUME = "latest", "auto"
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class SourceArgs(Group):
    """The places of datasets, for every program that reads some."""

    data_dir: str | None = flag(
        None, "Folder to find datasets in: NAME.jsonl and the like, NAME/, or a datasets cache."
    )
    skip_bad_rows: bool = flag(False, "Leave out rows that cannot be used, and count them.")


@dataclass
class DataArgs(SourceArgs):
    """What to train on."""

    title = "data"

    datasets: str = flag(
        "code_alpaca,mbpp",
        "Datasets, comma-separated: names (see dylora-moe datasets), or name=path for your own files.",
    )
    training_subset: float = flag(
        100.0, "Percent of the training rows to use, chosen at random.", gt=0, le=100, wording="a percentage {}"
    )
    eval_subset: float = flag(
        100.0, "Percent of the held-out rows to use, chosen at random.", gt=0, le=100, wording="a percentage {}"
    )
    interleaved_sampling: bool = flag(False, "Equal shares of all datasets; small ones repeat. Proportional otherwise.")
    mixing_temperature: float = flag(
        1.0, "Shares are proportional to size^(1/T): 1 is proportional, above it small sets get more.", ge=1
    )
    max_seq_length: int = flag(
        1024, "Most tokens of an example, and of a packed row.", parameter="max_length", ge=8, wording="{} tokens"
    )
    packing: bool = flag(True, "Join short training examples into full rows; they do not see each other.")
    overlong: str = flag(
        "cut",
        "Longer examples lose the end of their response (cut) or are left out (drop).",
        choices=("cut", "drop"),
    )
    template: str = flag(
        "auto",
        "Around conversations: the model's own (chat), Alpaca's (plain), or auto: chat if it has one.",
        choices=("auto", "chat", "plain"),
    )
    decontaminate: bool = flag(True, "Leave out rows that are tasks of HumanEval(+) or MBPP(+).")
    preprocessing_workers: int | None = flag(
        None, "Processes to tokenize with; as many as there are cores if not given.", parameter="workers", ge=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.names), "datasets", "at least one dataset name", repr(self.datasets))
        plain = self.plain_names
        twice = sorted({name for name in plain if plain.count(name) > 1})
        require(not twice, "datasets", "different datasets", f"{', '.join(twice)} more than once")
        both = self.interleaved_sampling and self.mixing_temperature != 1
        require(
            not both, "mixing_temperature", "left out where --interleaved_sampling is given", self.mixing_temperature
        )

    @property
    def temperature(self) -> float:
        """The mixing temperature; infinite for equal shares."""
        return math.inf if self.interleaved_sampling else self.mixing_temperature

    @property
    def workers(self) -> int:
        """``preprocessing_workers``, resolved."""
        return self.preprocessing_workers or len(os.sched_getaffinity(0))

    @property
    def names(self) -> list[str]:
        """The datasets, in order."""
        return split_names(self.datasets)

    @property
    def plain_names(self) -> list[str]:
        """The names of the datasets without their paths."""
        return [name.partition("=")[0] for name in self.names]


@dataclass
class TrainArgs(Group):
    """How to train."""

    title = "training"

    num_epochs: float = flag(3.0, "Passes over the training data.", aliases=["num_train_epochs"], gt=0)
    max_steps: int = flag(-1, "Optimizer steps, instead of --num_epochs; -1 for no limit.")
    train_batch_size: int = flag(
        2, "Examples per device in one forward.", aliases=["per_device_train_batch_size"], ge=1
    )
    gradient_accumulation_steps: int = flag(32, "Forwards per optimizer step.", ge=1)
    eval_batch_size: int = flag(
        8, "Examples per device in one evaluation forward.", aliases=["per_device_eval_batch_size"], ge=1
    )
    learning_rate: float = flag(2e-4, "Peak learning rate.", gt=0)
    router_learning_rate: float | None = flag(None, "The router's own; as --learning_rate if not given.", ge=0)
    lr_strategy: str | None = flag(
        None,
        "After the warm-up: constant, linear, cosine (if not given) or cosine_restarts (two cycles).",
        choices=SCHEDULES,
    )
    cosine_restarts: bool = flag(False, "Short for --lr_strategy cosine_restarts.")
    warmup_ratio: float = flag(0.03, "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    weight_decay: float = flag(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.", gt=0)
    label_smoothing: float = flag(
        0.0, "Share of each target spread over the vocabulary.", aliases=["label_smoothing_factor"], ge=0, lt=1
    )
    bf16: bool = flag(False, "Base model and activations in bfloat16; experts stay in float32.")
    gradient_checkpointing: bool = flag(False, "Less memory, more time.", aliases=["activation_checkpointing"])
    early_stopping_patience: int | None = flag(
        None, "Stop after this many evaluations without a lower mean loss over the domains.", ge=1
    )
    logging_steps: int = flag(10, "Steps between two log entries.", ge=1)
    report_to: str = flag(
        "auto",
        "Trackers, comma-separated: tensorboard, wandb, mlflow, trackio; none; or auto: tensorboard if installed.",
    )
    save_total_limit: int = flag(
        2,
        "Checkpoints to keep, the newest and the best among them.",
        ge=2,
        wording="{}, the newest checkpoint and one to fall back to",
    )
    seed: int = flag(42, "Seed of everything random except the data splits, which never change.")
    output_dir: str = flag("./results", "Where checkpoints, logs and best_model go.")
    overwrite_output_dir: bool = flag(False, "Remove the checkpoints of an earlier run in --output_dir.")
    save_in_place: bool = flag(
        False,
        "Write checkpoints and the mixture under their own names and rename no folder, for --output_dir on object "
        "storage.",
    )
    save_minutes: float | None = flag(
        None, "Also save a checkpoint whenever this many minutes have passed since the last one.", gt=0
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Resume from this checkpoint folder, or from the newest complete one in --output_dir if no folder is named; "
        "'auto' starts a new run where there is none.",
        bare=LATEST,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps == -1 or self.max_steps > 0, "max_steps", "-1 or at least 1", self.max_steps)
        fresh = not (self.overwrite_output_dir and self.resume_from_checkpoint)
        require(fresh, "overwrite_output_dir", "left out where --resume_from_checkpoint is given", "both")
        require(
            not self.cosine_restarts or self.lr_strategy in (None, "cosine_restarts"),
            "cosine_restarts",
            "left out where --lr_strategy is another one",
            f"--lr_strategy {self.lr_strategy} with it",
        )
        trackers = split_names(self.report_to)
        known = trackers in (["auto"], ["none"]) or (bool(trackers) and set(trackers) <= set(TRACKERS))
        require(known, "report_to", f"auto, none or some of {', '.join(TRACKERS)}", repr(self.report_to))

    @property
    def schedule(self) -> str | None:
        """The learning-rate schedule that the flags ask for; None if they name none."""
        return "cosine_restarts" if self.cosine_restarts else self.lr_strategy


@dataclass
class WandbArgs(Group):
    """What is logged to Weights & Biases, and fetched from it."""

    title = "Weights & Biases"

    wandb_project: str | None = flag(
        None, "Log the run to this project; WANDB_PROJECT or dylora-moe if only other W&B flags are given."
    )
    wandb_entity: str | None = flag(None, "User or team of the project.")
    wandb_run_name: str | None = flag(None, "Name of the run; W&B invents one if not given.")
    wandb_log_model: bool = flag(False, "Upload checkpoints and the best model as artifacts.")
    wandb_checkpoint_artifact: str | None = flag(
        None, "Resume from this checkpoint, and its run: user/project/artifact:v0, or folder:PATH/artifact:v0."
    )

    @property
    def enabled(self) -> bool:
        """Whether one of these flags asks for a run on W&B."""
        artifact = self.wandb_checkpoint_artifact
        fetched = artifact is not None and not artifact.startswith("folder:")
        named = self.wandb_project or self.wandb_entity or self.wandb_run_name
        return bool(named or self.wandb_log_model or fetched)


@dataclass
class RunArgs(Group):
    """How to run the program itself."""

    title = "run"

    config: str | None = flag(None, "YAML file with any of these flags; the command line wins.")
    dry_run: bool = flag(False, "Print the resolved configuration and stop.")


@dataclass
class GenerateArgs(Group):
    """What to generate, and with what."""

    title = "generation"

    trained_model: str = flag("./results/best_model", "Checkpoint folder, or a Hub id.")
    base_model: str | None = flag(
        None, "Where its base model is now, a folder or Hub id; where the checkpoint says if not given."
    )
    prompt: str | None = flag(None, "Text to continue; read from standard input if not given.")
    instruction: str | None = flag(None, "A task in words, put into the template of the instruction datasets.")
    expert: str | None = flag(None, "Use this expert alone, instead of the mixture.")
    base_only: bool = flag(False, "Use the base model without any expert.")
    route: str | None = flag(
        None,
        "What chooses a token's experts: the tokens before it (token), or the whole prompt for all (prompt); as the "
        "mixture says if not given.",
        choices=("token", "prompt"),
    )
    max_new_tokens: int = flag(128, "Most tokens to generate.", ge=1)
    temperature: float = flag(0.0, "0 is greedy; above, sampling.", ge=0)
    top_p: float = flag(1.0, "Sample from the smallest set of tokens with this probability.", gt=0, le=1)
    num_beams: int = flag(1, "Beams of a beam search; 1 for none.", ge=1)
    seed: int = flag(42, "Seed of sampling.")

    def __post_init__(self) -> None:
        super().__post_init__()
        two = self.prompt is not None and self.instruction is not None
        require(not two, "prompt", "left out where --instruction is given", "both")
        require(not (self.base_only and self.expert), "expert", "left out where --base_only is given", self.expert)
        greedy = self.temperature == 0
        require(greedy or self.num_beams == 1, "num_beams", "1 where --temperature is above 0", self.num_beams)


@dataclass
class DatasetsArgs(SourceArgs):
    """What to list."""

    title = "datasets"

    datasets: str | None = flag(
        None, "Read these, as train would, and show what is in them; without it, list what there is."
    )

    @property
    def names(self) -> list[str]:
        """The datasets, in order."""
        return split_names(self.datasets or "")


@dataclass(frozen=True)
class _NamedTrainConfig:
    """The flags of ``train`` that have a name of their own here."""

    model: ModelArgs
    experts: ExpertArgs
    data: DataArgs
    training: TrainArgs
    wandb: WandbArgs
    benchmark: LiveBenchmarkArgs
    run: RunArgs


_OTHER_FIELDS = other_fields(names_of(_NamedTrainConfig))


@dataclass(frozen=True)
class TrainConfig(_NamedTrainConfig):
    """All flags of ``train``."""

    passthrough: PassthroughArgs = field(metadata={GROUP: _OTHER_FIELDS})

    def __post_init__(self) -> None:
        if self.experts.teach_router == "domains":
            number = len(self.data.names)
            require(number > 1, "datasets", "two or more where --teach_router is domains", repr(self.data.datasets))
            self.experts.resolve_num_experts(number)

    @property
    def uses_wandb(self) -> bool:
        """Whether the run is logged to W&B: by one of the W&B flags, or as one of the trackers."""
        return self.wandb.enabled or "wandb" in split_names(self.training.report_to)


@dataclass(frozen=True)
class SkillTrainConfig(TrainConfig):
    """All flags of ``train``, with the experts that ``acquire`` needs."""

    experts: GrowingExpertArgs


@dataclass(frozen=True)
class AcquireConfig:
    """All flags of ``acquire``: its own, and those of the training of each skill."""

    acquire: AcquireArgs
    train: SkillTrainConfig


COMMANDS: Mapping[str, tuple[type["DataclassInstance"], ...]] = {
    "train": (TrainConfig,),
    "acquire": (AcquireConfig,),
    "compose": (ComposeArgs,),
    "experts": (ExpertsArgs,),
    "benchmark": (BenchmarkArgs,),
    "generate": (GenerateArgs,),
    "datasets": (DatasetsArgs,),
    "submit": (SubmitArgs, TrainConfig),
    "entrypoint": (TrainConfig, BenchmarkArgs),
}
"""The flags that each program takes."""
