"""Benchmark the mixture during training: its current weights, after each epoch or once at the end."""

import tempfile
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.config import TrainConfig
from dylo_moe.data import encode_prompt
from dylo_moe.evaluation import (
    BenchmarkPrompts,
    BenchmarkResult,
    BenchmarkRun,
    GenerationSettings,
    Judge,
    Problem,
    choose_sandbox,
    load_problems,
    write_result,
)
from dylo_moe.runs.benchmark_setup import style_of
from dylo_moe.training import DyLoRATrainer

_RESULT_FILE = "benchmark.json"


class LiveBenchmark(TrainerCallback):
    """A callback that scores the model in training by greedy decoding on a few tasks, and logs the scores.

    Logged are ``eval_benchmark_<name>_pass_at_1`` and ``eval_benchmark_<name>_standard_error``, fractions from 0 to 1;
    ``benchmark.json`` in the output folder holds the newest result with every verdict. Weights, module modes and the
    random state of the training do not change. If the model cannot be scored, training ends with the error. With
    several processes the first one scores, and the others wait.

    Args:
        flags: The flags of the training run.
        console: Receives the scores.

    Raises:
        DyLoRAError: Problems are missing, or no sandbox works on this machine. Raised before training starts.
    """

    def __init__(self, flags: TrainConfig, console: Console) -> None:
        args = flags.benchmark
        self._args, self._seed, self._console = args, flags.training.seed, console
        self._problems: dict[str, list[Problem]] = {}
        if args.benchmark_strategy != "none":
            self._problems = {name: load_problems(name)[: args.benchmark_samples] for name in args.benchmarks or []}
            self._sandbox = choose_sandbox().sandbox
        self._trainer: DyLoRATrainer | None = None

    def attach(self, trainer: DyLoRATrainer) -> None:
        """Add this callback to a trainer, which then also logs the scores."""
        self._trainer = trainer
        trainer.add_callback(self)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._args.benchmark_strategy == "epoch":
            self.score()

    def score_final(self) -> None:
        """Score the trained model if ``--benchmark_strategy`` is ``final``."""
        if self._args.benchmark_strategy == "final":
            self.score()

    def score(self) -> BenchmarkResult | None:
        """Score the current weights and log the scores; return None in every process but the first."""
        trainer = self._trainer
        assert trainer is not None
        if not trainer.is_world_process_zero():
            trainer.accelerator.wait_for_everyone()
            return None
        args, model, tokenizer = self._args, trainer.model, trainer.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        prompts = BenchmarkPrompts(
            problems=self._problems,
            style=style_of("auto", model.prompt_template, tokenizer),
            encode=lambda text: encode_prompt(tokenizer, text),
            max_samples=args.benchmark_samples,
        )
        sampling = GenerationSettings(
            max_new_tokens=args.benchmark_max_new_tokens, batch_size=args.benchmark_batch_size, seed=self._seed
        )
        run = BenchmarkRun(model, "the mixture in training", tokenizer, prompts, sampling)
        with Judge(self._sandbox) as judge, tempfile.TemporaryDirectory() as folder:
            result = run.run(judge, Path(folder) / "samples.jsonl", sandbox=self._sandbox.name)
        scores: dict[str, float] = {}
        for name, record in result.benchmarks.items():
            estimate = record.pass_at[1]
            scores[f"eval_benchmark_{name}_pass_at_1"] = estimate.value
            scores[f"eval_benchmark_{name}_standard_error"] = estimate.standard_error
            score = f"{name}: pass@1 {estimate.value:.3f} ± {estimate.standard_error:.3f}"
            self._console.print(f"{score} on {len(record.verdicts)} tasks", highlight=False)
        write_result(Path(trainer.args.output_dir or ".") / _RESULT_FILE, result)
        trainer.log(scores)
        trainer.accelerator.wait_for_everyone()
        return result
