"""The configuration: one field is the default, the check, the help text and the flag.

A flag comes from the command line, from the file that ``--config`` names, or from its default, in that order.
It may be written with ``-`` or ``_``. Everything a program needs is in these dataclasses; nothing below the
programs sees them.
"""

import dataclasses
import math
import os
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from typing_extensions import override

from dylo_moe.errors import ConfigError, did_you_mean

LATEST = "latest"
OWN_BASE = "own"
BENCHMARKS = ("humaneval", "humanevalplus", "mbpp", "mbppplus")


def _flag(default: Any, help: str, aliases: Sequence[str] = (), **argparse_options: Any) -> Any:
    """A field that is a flag; each alias is known with ``-`` and with ``_``."""
    spellings = [
        spelling for alias in aliases for spelling in dict.fromkeys((alias, "--" + alias[2:].replace("_", "-")))
    ]
    return HfArg(default=default, help=help, aliases=spellings, metadata=argparse_options)


def split_names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _require(ok: bool, flag: str, wanted: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"--{flag} must be {wanted}, got {got}")


@dataclass
class ModelArguments:
    """Which base model."""

    _argument_group_name: ClassVar[str] = "base model"

    model_name: str = _flag(
        default="google/codegemma-2b",
        aliases=["--base_model"],
        help="Hub id, folder, or 'demo' for the embedded SmolLM2-135M-Instruct, which needs no Hub.",
    )
    revision: str | None = _flag(default=None, help="Commit, tag or branch of the model on the Hub.")


@dataclass
class ExpertArguments:
    """The experts and their router."""

    _argument_group_name: ClassVar[str] = "experts and router"

    num_experts: int = _flag(default=4, help="How many experts to train.")
    lora_r: int = _flag(default=16, aliases=["--rank"], help="Rank of each expert.")
    lora_alpha: float | None = _flag(default=None, help="Updates are scaled by alpha / rank; 2 x rank if not given.")
    lora_dropout: float = _flag(default=0.0, help="Dropout on the experts' input while training.")
    use_rslora: bool = _flag(default=False, help="Scale updates by alpha / sqrt(rank) instead.")
    target_modules: str | None = _flag(
        default=None, help="Linear modules to adapt, comma-separated, or all-linear; the attention if not given."
    )
    routing: str = _flag(
        default="per_layer", help="Where the router reads: per_layer, prefix:K, prefix (K = layers / 4) or final."
    )
    top_k: int | None = _flag(default=None, help="Experts per token, once routing is sparse; 2 if not given.")
    router_temperature: float = _flag(default=1.0, help="Divides the router's logits; lower is sharper.")
    balance_coefficient: float = _flag(
        default=0.01, aliases=["--router_aux_loss_coef"], help="Weight of the balance loss."
    )
    z_loss_coefficient: float = _flag(default=0.0, help="Weight of the router z-loss.")

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, "num_experts", "at least 1", self.num_experts)
        if self.top_k is None:
            self.top_k = min(2, self.num_experts)
        _require(self.lora_r >= 1, "lora_r", "at least 1", self.lora_r)
        _require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", "above 0", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "from 0 up to but not including 1", self.lora_dropout)
        _require(
            1 <= self.top_k <= self.num_experts,
            "top_k",
            f"from 1 to the number of experts ({self.num_experts})",
            self.top_k,
        )
        _require(self.router_temperature > 0, "router_temperature", "above 0", self.router_temperature)
        _require(self.balance_coefficient >= 0, "balance_coefficient", "0 or more", self.balance_coefficient)
        _require(self.z_loss_coefficient >= 0, "z_loss_coefficient", "0 or more", self.z_loss_coefficient)

    @property
    def experts_per_token(self) -> int:
        """``top_k``, resolved."""
        assert self.top_k is not None
        return self.top_k

    @property
    def targets(self) -> str | list[str] | None:
        """The target modules as ``DyLoRA_MoE`` takes them."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return self.target_modules
        return split_names(self.target_modules)


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
    learning_rate: float = _flag(default=2e-4, help="Peak learning rate of experts and router.")
    warmup_ratio: float = _flag(default=0.03, help="Share of the steps in which the learning rate rises.")
    cosine_restarts: bool = _flag(default=False, help="Two cosine cycles in the place of one.")
    weight_decay: float = _flag(default=0.0, help="AdamW's weight decay.")
    max_grad_norm: float = _flag(default=1.0, help="Gradients are clipped to this norm.")
    label_smoothing: float = _flag(
        default=0.0,
        aliases=["--label_smoothing_factor"],
        help="Share of each target spread over the vocabulary.",
    )
    bf16: bool = _flag(default=False, help="Base model and activations in bfloat16; experts stay in float32.")
    gradient_checkpointing: bool = _flag(default=False, help="Less memory, more time.")
    logging_steps: int = _flag(default=10, help="Steps between two log entries.")
    save_total_limit: int = _flag(default=2, help="Checkpoints to keep, besides the best.")
    seed: int = _flag(default=42, help="Seed of everything random but the data splits, which never move.")
    output_dir: str = _flag(default="./results", help="Where checkpoints, logs and best_model go.")
    resume_from_checkpoint: str | None = _flag(
        default=None,
        help="Go on from this checkpoint folder; from the newest one in --output_dir if no folder is named.",
        nargs="?",
        const=LATEST,
    )

    def __post_init__(self) -> None:
        _require(self.num_epochs > 0, "num_epochs", "above 0", self.num_epochs)
        _require(self.max_steps == -1 or self.max_steps > 0, "max_steps", "-1 or at least 1", self.max_steps)
        for flag in ("train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "logging_steps"):
            _require(getattr(self, flag) >= 1, flag, "at least 1", getattr(self, flag))
        _require(self.save_total_limit >= 1, "save_total_limit", "at least 1", self.save_total_limit)
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", "from 0 up to but not including 1", self.warmup_ratio)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.max_grad_norm > 0, "max_grad_norm", "above 0", self.max_grad_norm)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", "from 0 up to 1", self.label_smoothing)


@dataclass
class LiveBenchmarkArguments:
    """Whether to benchmark the model that is being trained."""

    _argument_group_name: ClassVar[str] = "benchmark while training"

    benchmark_strategy: str = _flag(
        default="none", help="Benchmark the mixture never (none), after every epoch (epoch), or once trained (final)."
    )
    benchmarks: list[str] | None = _flag(default=None, help=f"Which: {', '.join(BENCHMARKS)}; humaneval if not given.")
    benchmark_samples: int = _flag(default=20, help="Tasks of each benchmark, the first ones.")
    benchmark_max_new_tokens: int = _flag(default=256, help="Most tokens of an answer.")
    benchmark_batch_size: int = _flag(default=16, help="Answers that are generated at once.")

    def __post_init__(self) -> None:
        strategies = ("none", "epoch", "final")
        _require(
            self.benchmark_strategy in strategies,
            "benchmark_strategy",
            "none, epoch or final",
            repr(self.benchmark_strategy),
        )
        self.benchmarks = _benchmark_names("benchmarks", self.benchmarks)
        for flag in ("benchmark_samples", "benchmark_max_new_tokens", "benchmark_batch_size"):
            _require(getattr(self, flag) >= 1, flag, "at least 1", getattr(self, flag))


def _benchmark_names(flag: str, given: Sequence[str] | None) -> list[str]:
    """The benchmarks of a flag, which may be separated by spaces or commas, each once."""
    names = list(dict.fromkeys(name for text in given or BENCHMARKS[:1] for name in split_names(text)))
    for name in names:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise ConfigError(f"--{flag} must be of {known}, got {name!r}{did_you_mean(name, BENCHMARKS)}")
    _require(bool(names), flag, f"at least one of {', '.join(BENCHMARKS)}", "none")
    return names


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

    trained_model: str = _flag(default="./results/best_model", help="Checkpoint folder.")
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
class BenchmarkArguments:
    """What to score, on what, and how to sample."""

    _argument_group_name: ClassVar[str] = "benchmark"

    benchmarks: list[str] | None = _flag(default=None, help=f"Any of {', '.join(BENCHMARKS)}; humaneval if not given.")
    trained_model: str | None = _flag(
        default=None, help="Checkpoint folder of the mixture to score; ./results/best_model if not given."
    )
    base_model: str | None = _flag(
        default=None,
        help="Score a model without experts in the mixture's place: this Hub id, folder or 'demo'; without a name, "
        "the one that --trained_model was made on, or google/codegemma-2b.",
        nargs="?",
        const=OWN_BASE,
    )
    revision: str | None = _flag(default=None, help="Commit, tag or branch of --base_model on the Hub.")
    bf16: bool = _flag(default=False, help="Run a --base_model in bfloat16; a mixture runs as it was trained.")
    compare: list[str] | None = _flag(
        default=None,
        help="Two results (.json), checkpoint folders or base models: score those that are no results, and show the "
        "difference with its interval and the tasks that changed.",
    )
    prompt_style: str = _flag(
        default="auto",
        help="How a task is put: as a text to go on from (complete), in the model's own chat template (chat), under "
        "Alpaca's headings (plain), or auto: as in training, else chat where the model has one, else complete.",
    )
    max_samples: int | None = _flag(default=None, help="Tasks of each benchmark, the first ones; all if not given.")
    n_samples: int = _flag(default=1, help="Answers to each task; above 1 with a --temperature.")
    temperature: float = _flag(default=0.0, help="0 is greedy; above, sampling.")
    num_beams: int = _flag(default=1, help="Beams of a beam search; 1 for none.")
    batch_size: int = _flag(default=16, help="Answers that are generated at once.")
    max_new_tokens: int = _flag(default=512, help="Most tokens of an answer.")
    evalplus: bool = _flag(
        default=True, help="EvalPlus's problems, tests and sanitiser; --no_evalplus has the original ones alone."
    )
    data_dir: str | None = _flag(
        default=None, help="Folder to find MBPP's own rows in, as for train; for mbpp with --no_evalplus."
    )
    output: str | None = _flag(
        default=None,
        help="Result file (.json); results/benchmarks/NAME-DIGEST.json if not given. Samples lie beside it.",
    )
    seed: int = _flag(default=42, help="Seed of sampling.")
    unsafe_no_sandbox: bool = _flag(
        default=False, help="Run answers where nothing can contain them: with your rights, on your files."
    )

    def __post_init__(self) -> None:
        self.benchmarks = _benchmark_names("benchmarks", self.benchmarks)
        plus = [name for name in self.benchmarks if name.endswith("plus")]
        _require(self.evalplus or not plus, "benchmarks", "humaneval or mbpp with --no_evalplus", ", ".join(plus))
        _require(self.compare is None or len(self.compare) == 2, "compare", "two results or models", self.compare)
        styles = ("auto", "complete", "chat", "plain")
        _require(self.prompt_style in styles, "prompt_style", ", ".join(styles), repr(self.prompt_style))
        _require(self.max_samples is None or self.max_samples >= 1, "max_samples", "at least 1", self.max_samples)
        for flag in ("n_samples", "num_beams", "batch_size", "max_new_tokens"):
            _require(getattr(self, flag) >= 1, flag, "at least 1", getattr(self, flag))
        _require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        greedy = self.temperature == 0
        _require(greedy or self.num_beams == 1, "num_beams", "1 where --temperature is above 0", self.num_beams)
        _require(not greedy or self.n_samples == 1, "n_samples", "1 where --temperature is 0", self.n_samples)
        _require(self.output is None or self.output.endswith(".json"), "output", "a .json file", self.output)
        both = self.compare is not None and (self.trained_model or self.base_model or self.output)
        _require(not both, "compare", "given without --trained_model, --base_model and --output", "them as well")


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


TRAIN_GROUPS = (
    ModelArguments,
    ExpertArguments,
    DataArguments,
    TrainingArgumentsGroup,
    LiveBenchmarkArguments,
    RunArguments,
)
GENERATE_GROUPS = (GenerateArguments,)
BENCHMARK_GROUPS = (BenchmarkArguments,)
DATASETS_GROUPS = (DatasetsArguments,)


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag, and a default only where it says something."""

    @override
    def _format_action_invocation(self, action: Any) -> str:
        if not action.option_strings or action.dest == "help":
            return str(super()._format_action_invocation(action))
        metavar = "" if action.const is True else f" {self._format_args(action, action.dest.upper())}"
        return f"{action.option_strings[0]}{metavar}"

    @override
    def _get_help_string(self, action: Any) -> str | None:
        if action.default in (None, False, SUPPRESS):
            return str(action.help)
        text: str | None = super()._get_help_string(action)
        return text


class _Parser(HfArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parse(groups: Sequence[type[Any]], program: str, description: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Reads a command line, and the YAML file that its ``--config`` names, into one dataclass a group.

    Raises:
        ConfigError: A flag or a key is unknown, or a value is not allowed.
    """
    parser = _Parser(
        list(groups),  # type: ignore[arg-type]
        prog=program, description=description, formatter_class=_HelpFormatter, allow_abbrev=False,
        usage=f"{program} [--flag value ...]",
    )  # fmt: skip
    known = [option for action in parser._actions for option in action.option_strings]
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise ConfigError(f"unknown argument {flag!r}{did_you_mean(flag, known)}; see {program} --help")
    config_file = getattr(given, "config", None)
    if config_file is not None:
        parser.set_defaults(**_read_yaml(Path(config_file), groups))
    return tuple(parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False))


def to_yaml(groups: Sequence[Any]) -> str:
    """The resolved configuration as the text of a file that ``--config`` reads."""
    values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    for key in ("config", "dry_run"):
        values.pop(key, None)
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


def _read_yaml(path: Path, groups: Sequence[type[Any]]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold 'flag: value' lines, got a {type(values).__name__}")
    types = {key: hint for group in groups for key, hint in get_type_hints(group).items() if key[0] != "_"}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"--config {path} has the unknown key {key!r}{did_you_mean(str(key), types)}")
        try:
            # YAML reads 1e-3 as text and 2 as a whole number: pydantic makes them what the field wants, or refuses
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"--config {path}: {key} cannot be {value!r}: {reason}") from error
    return values
