"""The flags of benchmarks: of the program, and of benchmarks while a model is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from dylo_moe.config.parser import Group, flag, require, split_names
from dylo_moe.errors import ConfigError, did_you_mean
from dylo_moe.evaluation import BENCHMARKS

OWN_BASE = "own"


@dataclass
class LiveBenchmarkArgs(Group):
    """Whether and how to benchmark the model that is being trained."""

    title = "benchmark while training"

    benchmark_strategy: str = flag(
        "none",
        "Benchmark the mixture never (none), after every epoch (epoch), or once trained (final).",
        choices=("none", "epoch", "final"),
    )
    benchmarks: list[str] | None = flag(None, f"Which: {', '.join(BENCHMARKS)}; humaneval if not given.")
    benchmark_samples: int = flag(20, "Tasks of each benchmark, the first ones.", ge=1)
    benchmark_max_new_tokens: int = flag(256, "Most tokens of an answer.", ge=1)
    benchmark_batch_size: int = flag(16, "Answers that are generated at once.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.benchmarks = _benchmark_names(self.benchmarks)


@dataclass
class BenchmarkArgs(Group):
    """What to score, on what, and how to sample."""

    title = "benchmark"

    benchmarks: list[str] | None = flag(None, f"Any of {', '.join(BENCHMARKS)}; humaneval if not given.")
    trained_model: str | None = flag(
        None, "Checkpoint folder of the mixture to score; ./results/best_model if not given."
    )
    wandb_artifact: str | None = flag(
        None, "Score this mixture from W&B: user/project/model:v0, or folder:PATH/model:v0."
    )
    base_model: str | None = flag(
        None,
        "Score a model without experts: this Hub id, folder or 'demo'; without a name, the one that --trained_model "
        "was made on, or google/codegemma-2b. A name together with --trained_model, --wandb_artifact or --compare says "
        "where the mixture's base model is now, and the mixture is scored.",
        bare=OWN_BASE,
    )
    revision: str | None = flag(None, "Commit, tag or branch of --base_model on the Hub.")
    bf16: bool = flag(False, "Run a --base_model in bfloat16; a mixture runs as it was trained.")
    compare: list[str] | None = flag(
        None,
        "Two results (.json), checkpoint folders or base models: score those that are no results, and show the "
        "difference with its interval and the tasks that changed.",
    )
    prompt_style: str = flag(
        "auto",
        "How a task is put: as a text to continue (complete), in the model's own chat template (chat), under "
        "Alpaca's headings (plain), or auto: as in training, else chat where the model has one, else complete.",
        choices=("auto", "complete", "chat", "plain"),
    )
    max_samples: int | None = flag(None, "Tasks of each benchmark, the first ones; all if not given.", ge=1)
    n_samples: int = flag(1, "Answers to each task; above 1 with a --temperature.", ge=1)
    temperature: float = flag(0.0, "0 is greedy; above, sampling.", ge=0)
    num_beams: int = flag(1, "Beams of a beam search; 1 for none.", ge=1)
    batch_size: int = flag(16, "Answers that are generated at once.", ge=1)
    max_new_tokens: int = flag(512, "Most tokens of an answer.", ge=1)
    evalplus: bool = flag(True, "EvalPlus's problems, tests and sanitizer; --no_evalplus has the original ones alone.")
    data_dir: str | None = flag(None, "Folder to find MBPP's own rows in, as for train; for mbpp with --no_evalplus.")
    output: str | None = flag(
        None,
        "Result file (.json); results/benchmarks/NAME-DIGEST.json if not given. The samples are stored next to it.",
        pattern=r".*\.json",
        wording="a .json file",
    )
    seed: int = flag(42, "Seed of sampling.")
    unsafe_no_sandbox: bool = flag(
        False, "Run answers where nothing can contain them: with your rights, on your files."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.benchmarks = _benchmark_names(self.benchmarks)
        plus = [name for name in self.benchmarks if name.endswith("plus")]
        require(self.evalplus or not plus, "benchmarks", "humaneval or mbpp with --no_evalplus", ", ".join(plus))
        require(self.compare is None or len(self.compare) == 2, "compare", "two results or models", self.compare)
        greedy = self.temperature == 0
        require(greedy or self.num_beams == 1, "num_beams", "1 where --temperature is above 0", self.num_beams)
        require(not greedy or self.n_samples == 1, "n_samples", "1 where --temperature is 0", self.n_samples)
        own = self.base_model == OWN_BASE
        both = self.compare is not None and (self.trained_model or self.wandb_artifact or own or self.output)
        require(not both, "compare", "given without other models and --output", "them as well")
        moved = self.scores_mixture and self.base_model is not None
        require(not moved or not self.revision, "revision", "left out where a mixture is scored", self.revision)
        two = self.trained_model is not None and self.wandb_artifact is not None
        require(not two, "wandb_artifact", "left out where --trained_model is given", "both")

    @property
    def scores_mixture(self) -> bool:
        """Whether a mixture is scored; ``base_model`` then only says where its base is."""
        named = self.trained_model is not None or self.wandb_artifact is not None
        return self.base_model is None or (named and self.base_model != OWN_BASE)


def _benchmark_names(given: Sequence[str] | None) -> list[str]:
    """Return the values of ``--benchmarks``, separated by spaces or commas, each once; the first one if none."""
    names = list(dict.fromkeys(name for text in given or BENCHMARKS[:1] for name in split_names(text)))
    known = ", ".join(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"--benchmarks must be any of {known}, got {name!r}{did_you_mean(name, BENCHMARKS)}")
    require(bool(names), "benchmarks", f"at least one of {known}", "none")
    return names
