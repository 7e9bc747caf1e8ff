"""``benchmark``: measure pass@k of a mixture or a base model on HumanEval(+) and MBPP(+), or compare two models."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dylo_moe.config import BenchmarkArgs, parse
from dylo_moe.core import DESCRIPTION_FILE, DyLoRA_MoE, read_description
from dylo_moe.data import AUTO, encode_prompt
from dylo_moe.evaluation import (
    BenchmarkPrompts,
    BenchmarkResult,
    BenchmarkRun,
    GenerationSettings,
    Judge,
    choose_sandbox,
    compare_results,
    read_result,
    write_result,
)
from dylo_moe.reports import comparison_table, result_table
from dylo_moe.runs import check_writable, chosen_problems, load_model, style_of

_RESULTS = Path("results") / "benchmarks"


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
    check_writable(Path(args.output).parent if args.output else _RESULTS, "--output")
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
        output = Path(args.output) if args.output else _RESULTS / f"{stem}-{run.digest[:8]}.json"
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
