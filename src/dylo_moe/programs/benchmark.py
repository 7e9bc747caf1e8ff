"""``benchmark``: measure pass@k of a mixture or a base model on HumanEval(+) and MBPP(+), or compare two models."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from dylo_moe.benchmark_config import OWN_BASE, BenchmarkArgs
from dylo_moe.core.base_model import DTYPES, load_base_model, load_tokenizer
from dylo_moe.core.checkpoint import DESCRIPTION_FILE, read_description
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.core.save_and_load import locate_base
from dylo_moe.data.examples import read_rows
from dylo_moe.data.registry import resolve
from dylo_moe.data.rows import Row, user_message
from dylo_moe.data.templates import AUTO, template_of
from dylo_moe.data.tokenization import encode_prompt
from dylo_moe.errors import ConfigError, EvaluationError
from dylo_moe.evaluation.canary import choose_sandbox
from dylo_moe.evaluation.generation import GenerationSettings, Model
from dylo_moe.evaluation.judge import Judge
from dylo_moe.evaluation.problems import Problem, load_problems
from dylo_moe.evaluation.prompts import COMPLETE, PromptStyle
from dylo_moe.evaluation.results import BenchmarkResult, compare_results, read_result, write_result
from dylo_moe.evaluation.run import BenchmarkPrompts, BenchmarkRun
from dylo_moe.flags import parse
from dylo_moe.model_config import ModelArgs
from dylo_moe.programs.mixtures import load_mixture, to_device
from dylo_moe.programs.output_folder import check_writable
from dylo_moe.reports.benchmark_tables import comparison_table, result_table
from dylo_moe.training.fetching import fetch_mixture

DEFAULT_MIXTURE = "./results/best_model"
RESULTS = Path("results") / "benchmarks"
ARTIFACTS = Path("results") / "artifacts"


def main(arguments: Sequence[str], program: str = "dylora-moe benchmark") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    args = parse(BenchmarkArgs, program, "Score a mixture or a base model on code benchmarks.", arguments)
    transformers.logging.disable_progress_bar()
    console = Console()
    if args.compare is None:
        benchmark(args, console)
        return 0
    before, after = (
        read_result(Path(name)) if name.endswith(".json") else benchmark(one, console)
        for name, one in zip(args.compare, _args_per_model(args), strict=True)
    )
    console.print(comparison_table(compare_results(before, after), before.model, after.model))
    return 0


def benchmark(args: BenchmarkArgs, console: Console) -> BenchmarkResult:
    """Score one model, write its result to a file and print it.

    Args:
        args: The flags of the program.
        console: Receives the progress messages and the table of scores.

    Returns:
        The result, with the verdict on every sample.

    Raises:
        DyLoRAError: The user can fix it.
    """
    check_writable(Path(args.output).parent if args.output else RESULTS, "--output")
    problems = chosen_problems(args)
    choice = choose_sandbox(args.unsafe_no_sandbox)
    console.print(choice.describe(), highlight=False, soft_wrap=True)
    with Judge(choice.sandbox) as judge:
        model, tokenizer, name = load_model(args)
        console.print(f"Scoring {name}, a {type(model).__name__}", highlight=False, soft_wrap=True)
        template = model.prompt_template if isinstance(model, DyLoRA_MoE) else None
        prompts = BenchmarkPrompts(
            problems=problems,
            style=style_of(args.prompt_style, template, tokenizer),
            encode=lambda text: encode_prompt(tokenizer, text),
            max_samples=args.max_samples,
            evalplus=args.evalplus,
        )
        run = BenchmarkRun(model, name, tokenizer, prompts, _sampling(args))
        stem = re.sub(r"[^\w.-]+", "-", Path(name).name) or "model"
        output = Path(args.output) if args.output else RESULTS / f"{stem}-{run.digest[:8]}.json"
        with _progress(console) as progress:
            task = progress.add_task("Answering", total=None, speed="")
            result = run.run(
                judge,
                output.with_suffix(".samples.jsonl"),
                sandbox=choice.sandbox.name,
                progress=lambda done, total, speed: progress.update(
                    task, completed=done, total=total, speed=f"{speed:.0f} tokens/s"
                ),
            )
    write_result(output, result)
    console.print(result_table(result))
    console.print(f"Result: {output}", highlight=False, soft_wrap=True)
    return result


def load_model(args: BenchmarkArgs) -> tuple[Model, PreTrainedTokenizerBase, str]:
    """Load the mixture or base model that the flags name.

    Returns:
        The model, its tokenizer, and its name for the report.

    Raises:
        DyLoRAError: A part of it is missing or cannot be loaded.
    """
    if args.scores_mixture:
        folder = _mixture_folder(args)
        mixture, tokenizer = load_mixture(folder, args.base_model)
        return mixture, tokenizer, str(folder)
    assert args.base_model is not None
    name, revision = args.base_model, args.revision
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if name == OWN_BASE:
        name = ModelArgs.model_name
        if args.trained_model is not None or args.wandb_artifact is not None:
            folder = _mixture_folder(args)
            entry = read_description(folder).base_model
            name, revision = locate_base(folder, entry)
            dtype = DTYPES[entry.dtype]
    base = load_base_model(name, revision=revision, dtype=dtype).eval()
    to_device(base)
    return base, load_tokenizer(name, revision=revision), name


def _mixture_folder(args: BenchmarkArgs) -> Path:
    """Return the folder of the mixture; an artifact is downloaded first."""
    if args.wandb_artifact is not None:
        return fetch_mixture(args.wandb_artifact, ARTIFACTS)
    folder = Path(args.trained_model or DEFAULT_MIXTURE)
    if args.trained_model is None and not (folder / DESCRIPTION_FILE).is_file():
        raise ConfigError(f"there is no mixture in {folder} yet: name one with --trained_model, or give --base_model")
    return folder


def style_of(choice: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
    """Return the style of the prompts for a model.

    Args:
        choice: ``auto``, ``complete``, ``chat`` or ``plain``.
        template: Name of the template that the model was trained with; None if unknown.
        tokenizer: The tokenizer of the model.

    Raises:
        ConfigError: ``choice`` is ``chat``, and the model has no chat template.
    """
    if choice == AUTO:
        choice = template or ("chat" if tokenizer.chat_template else COMPLETE)
    if choice == COMPLETE:
        return PromptStyle()
    if choice == "chat" and not tokenizer.chat_template:
        raise ConfigError("--prompt_style chat needs a model with a chat template, and this one has none")
    chosen = template_of(choice, tokenizer)
    return PromptStyle(choice, lambda instruction: chosen.render(user_message(instruction)))


def chosen_problems(args: BenchmarkArgs) -> dict[str, list[Problem]]:
    """Load the problems of each benchmark in ``--benchmarks``, by the benchmark's name.

    Raises:
        DyLoRAError: The data of a benchmark cannot be read, or holds no task.
    """
    rows: list[Row] | None = None
    if "mbpp" in (args.benchmarks or []) and not args.evalplus:
        rows = read_rows(resolve("mbpp", args.data_dir))
    chosen = {name: load_problems(name, args.evalplus, rows)[: args.max_samples] for name in args.benchmarks or []}
    for name, problems in chosen.items():
        if not problems:
            raise EvaluationError(f"--benchmarks {name}: its data holds no task to ask; check --data_dir")
    return chosen


def _args_per_model(args: BenchmarkArgs) -> list[BenchmarkArgs]:
    """Return the flags of both runs of a comparison; both use the prompt style of the first mixture."""
    assert args.compare is not None
    mixtures = [Path(name) for name in args.compare if (Path(name) / DESCRIPTION_FILE).is_file()]
    style = args.prompt_style
    if style == AUTO and mixtures:
        style = read_description(mixtures[0]).prompt_template or AUTO
    return [
        replace(
            args,
            compare=None,
            prompt_style=style,
            trained_model=name if Path(name) in mixtures else None,
            base_model=args.base_model if Path(name) in mixtures else name,
        )
        for name in args.compare
    ]


def _sampling(args: BenchmarkArgs) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        num_beams=args.num_beams,
        n_samples=args.n_samples,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )
