"""The flags of benchmarks: of the program, and of training with one in between.

Part of the configuration; the flags of data, training and the other programs are in ``config.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dylo_moe.errors import ConfigError, did_you_mean
from dylo_moe.flags import flag as _flag
from dylo_moe.flags import require as _require
from dylo_moe.flags import split_names

OWN_BASE = "own"
BENCHMARKS = ("humaneval", "humanevalplus", "mbpp", "mbppplus")


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
class BenchmarkArguments:
    """What to score, on what, and how to sample."""

    _argument_group_name: ClassVar[str] = "benchmark"

    benchmarks: list[str] | None = _flag(default=None, help=f"Any of {', '.join(BENCHMARKS)}; humaneval if not given.")
    trained_model: str | None = _flag(
        default=None, help="Checkpoint folder of the mixture to score; ./results/best_model if not given."
    )
    wandb_artifact: str | None = _flag(
        default=None, help="Score this mixture from W&B: user/project/model:v0, or folder:PATH/model:v0."
    )
    base_model: str | None = _flag(
        default=None,
        help="Score a model without experts: this Hub id, folder or 'demo'; without a name, the one that "
        "--trained_model was made on, or google/codegemma-2b. A name beside --trained_model, --wandb_artifact or "
        "--compare says where the mixture's base model is now, and the mixture is scored.",
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
        own = self.base_model == OWN_BASE
        both = self.compare is not None and (self.trained_model or self.wandb_artifact or own or self.output)
        _require(not both, "compare", "given without other models and --output", "them as well")
        moved = self.scores_mixture and self.base_model is not None
        _require(not moved or not self.revision, "revision", "left out where a mixture is scored", self.revision)
        two = self.trained_model is not None and self.wandb_artifact is not None
        _require(not two, "wandb_artifact", "left out where --trained_model is given", "both")

    @property
    def scores_mixture(self) -> bool:
        """Whether a mixture is scored, and ``base_model`` only says where its base is."""
        named = self.trained_model is not None or self.wandb_artifact is not None
        return self.base_model is None or (named and self.base_model != OWN_BASE)
