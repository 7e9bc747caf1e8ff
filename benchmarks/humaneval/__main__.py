"""HumanEval and HumanEval+ scores of a small model and of the demo's mixture on it, and the gain from batches.

    python -m benchmarks.humaneval FOLDER     measure, write benchmarks/humaneval/humaneval.json, print the tables
    python -m benchmarks.humaneval --show     print the tables of the committed result

FOLDER contains ``HumanEvalPlus.jsonl.gz``, EvalPlus's data. The mixture is trained by ``recipes/demo.yaml`` unless
``--mixture`` names its folder. The base and the mixture get the same prompts and answer greedily. Then the base answers
each batch of tasks twice, together and one task at a time, in turns: tokens per second are compared within a round, and
the answers word for word.

Covered: float32 on the CPU, SmolLM2-135M-Instruct. Not covered: GPUs, where batches gain more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.common.timing import Timed, interleaved, spread
from benchmarks.humaneval.tables import tables
from dylo_moe.commands.benchmark import benchmark
from dylo_moe.config.evaluation import BenchmarkArgs
from dylo_moe.core.base.loading import load_base_model, load_tokenizer
from dylo_moe.core.checkpoint import read_description
from dylo_moe.data.tokenization import encode_prompt
from dylo_moe.evaluation.benchmark_run import BenchmarkPrompts
from dylo_moe.evaluation.generation import GenerationSettings, Prompt, Sample, generate_samples, make_batches
from dylo_moe.evaluation.results import BenchmarkResult, compare_results
from dylo_moe.runs.benchmark_setup import chosen_problems, style_of

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_name("humaneval.json")
MODEL, RECIPE, STYLES = "demo", "recipes/demo.yaml", ["chat", "complete"]
BENCHMARKS = ["humaneval", "humanevalplus"]


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with HumanEvalPlus.jsonl.gz")
    parser.add_argument("--mixture", type=Path, help="folder of the demo's mixture, if it is trained already")
    parser.add_argument("--max_samples", type=int, help="only the first tasks")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--prompt_styles", nargs="+", default=STYLES, help="prompt styles; batches are timed in the first"
    )
    parser.add_argument("--rounds", type=int, help="number of batches to answer twice; all by default")
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None:
            parser.error("name the folder with HumanEvalPlus.jsonl.gz")
        # EvalPlus reads it on import
        os.environ["HUMANEVAL_OVERRIDE_PATH"] = str(args.folder / "HumanEvalPlus.jsonl.gz")
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(args, Path(scratch))
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    for table in tables(json.loads(args.output.read_text())).values():
        sys.stdout.write(table + "\n\n")


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure all sections and return the result."""
    console = Console(stderr=True)
    mixture = args.mixture or train_demo(scratch / "demo")
    read_description(mixture)  # a wrong folder should fail before the base is measured
    asked = [
        BenchmarkArgs(
            benchmarks=BENCHMARKS,
            prompt_style=style,
            max_samples=args.max_samples,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
        )
        for style in args.prompt_styles
    ]
    return {
        "environment": environment(),
        "styles": {one.prompt_style: score_style(one, mixture, scratch, console) for one in asked},
        "batching": measure_batching(asked[0], args.rounds, console),
    }


def score_style(asked: BenchmarkArgs, mixture: Path, scratch: Path, console: Console) -> dict[str, Any]:
    """Score the base and the mixture in one prompt style."""
    output = scratch / asked.prompt_style
    base = benchmark(replace(asked, base_model=MODEL, output=f"{output}-base.json"), console)
    mixed = benchmark(replace(asked, trained_model=str(mixture), output=f"{output}-mixture.json"), console)
    return {
        "settings": base.settings.model_dump(),
        "base": record_of(base),
        "mixture": record_of(mixed),
        "differences": {name: found.model_dump() for name, found in compare_results(base, mixed).items()},
    }


def train_demo(output: Path) -> Path:
    """Train the demo's mixture by its recipe in a separate process, and return its folder."""
    arguments = ["train", "--config", RECIPE, "--output_dir", str(output)]
    subprocess.run([sys.executable, "-m", "dylo_moe", *arguments], cwd=ROOT, check=True)
    return output / "best_model"


def record_of(result: BenchmarkResult) -> dict[str, Any]:
    """Return a result without paths of this machine, and with the tasks that passed instead of verdicts."""
    found = result.model_dump(exclude={"benchmarks", "settings"})
    found["model"]["name"] = Path(found["model"]["name"]).name
    found["benchmarks"] = {
        name: {
            **record.model_dump(include={"problems_hash", "pass_at"}),
            "tasks": len(record.verdicts),
            "passed": [task for task, share in record.passed().items() if share == 1.0],
            "statuses": count_statuses(record.verdicts),
        }
        for name, record in result.benchmarks.items()
    }
    return found


def count_statuses(verdicts: dict[str, Any]) -> dict[str, int]:
    """Return the number of answers with each status."""
    every = [verdict.status for found in verdicts.values() for verdict in found]
    return {status: every.count(status) for status in sorted(set(every))}


def measure_batching(asked: BenchmarkArgs, rounds: int | None, console: Console) -> dict[str, Any]:
    """Measure tokens per second of a batch and of its tasks one at a time, and list the answers that differ."""
    model, tokenizer = load_base_model(MODEL).eval(), load_tokenizer(MODEL)
    style = style_of(asked.prompt_style, None, tokenizer)
    prompts = BenchmarkPrompts(chosen_problems(asked), style, lambda text: encode_prompt(tokenizer, text))
    settings = GenerationSettings(max_new_tokens=asked.max_new_tokens, batch_size=asked.batch_size)
    batches = make_batches(prompts.prompts(), settings, set())[:rounds]
    answers: dict[str, list[list[Sample]]] = {"together": [], "one at a time": []}

    def contender(name: str, split: Callable[[list[tuple[Prompt, int]]], list[list[tuple[Prompt, int]]]]) -> Timed:
        def next_batch() -> None:
            batch = split(batches[len(answers[name])])
            answers[name].append([one for part in generate_samples(model, tokenizer, batch, settings) for one in part])

        short = settings.model_copy(update={"max_new_tokens": 4})
        return Timed(
            next_batch, len(batches), warm_up=lambda: list(generate_samples(model, tokenizer, batches[:1], short))
        )

    entries = {
        "together": contender("together", lambda batch: [batch]),
        "one at a time": contender("one at a time", lambda batch: [[one] for one in batch]),
    }
    seconds = interleaved(entries, progress=lambda text: console.print(text, highlight=False))
    speeds = {
        name: [
            sum(one.tokens for one in found) / time for found, time in zip(answers[name], seconds[name], strict=True)
        ]
        for name in answers
    }
    pairs = [
        (one, other)
        for batch, alone in zip(answers["together"], answers["one at a time"], strict=True)
        for one, other in zip(batch, alone, strict=True)
    ]
    ratios = [many / few for many, few in zip(speeds["together"], speeds["one at a time"], strict=True)]
    return {
        "batch_size": settings.batch_size,
        "seconds": seconds,
        "tokens_per_second": speeds,
        "ratio": spread(ratios),
        "answers": len(pairs),
        "different": [one.task_id for one, other in pairs if one != other],
    }


if __name__ == "__main__":
    main()
