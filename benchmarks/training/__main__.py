"""A real training run and its curves: the mixture, plain LoRA and rsLoRA with as many parameters.

    python -m benchmarks.training FOLDER      train, write benchmarks/training/training.json, draw the figure
    python -m benchmarks.training --show      print the table of the committed result

FOLDER contains ``mbpp.jsonl`` (Google's, 974 rows) and ``code_alpaca.json`` (any part of Code Alpaca). Each arm is one
run of ``dylora-moe train`` on the same rows in the same order, and so on the same number of tokens: the mixture with 4
experts of rank 16, and one expert of rank 64, which is plain LoRA, with both scalings. All have their adapters in the
same layers. A sweep on the first seed finds each arm's learning rate; the other seeds use it.

Covered: some hundred steps in float32 on the CPU, on a small model. Not covered: GPUs, larger models, longer runs, and
the time that the tokens take (see ``benchmarks.quality``): runs are parallel, one thread each.
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from dylo_moe.commands.train import train
from dylo_moe.config.commands import TrainConfig
from dylo_moe.config.parser import parse
from dylo_moe.reports.plots import training_curves
from dylo_moe.training.checkpointing.checkpoints import folder_of

RESULT = Path(__file__).with_name("training.json")
FIGURE = Path(__file__).parents[2] / "docs" / "training.png"


class Arm(NamedTuple):
    """One contender.

    Attributes:
        title: Title in the table.
        flags: Flags of ``train``.
        rates: Learning rates of the sweep. rsLoRA scales its updates by 16, LoRA of rank 64 by 2.
    """

    title: str
    flags: list[str]
    rates: list[str]


ARMS = {
    "mixture": Arm("mixture, 4 experts of rank 16", ["--num_experts", "4", "--lora_r", "16"], ["5e-4", "1e-3", "2e-3"]),
    "lora": Arm("LoRA, rank 64", ["--num_experts", "1", "--lora_r", "64"], ["5e-4", "1e-3", "2e-3"]),
    "rslora": Arm(
        "rsLoRA, rank 64", ["--num_experts", "1", "--lora_r", "64", "--use_rslora"], ["1.25e-4", "2.5e-4", "5e-4"]
    ),
}
SEEDS = (0, 1, 2)
STEPS, EVAL_STEPS, MAX_LENGTH, BATCH_SIZE = 400, 100, 192, 1


def main() -> None:
    """Read the flags, train, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with mbpp.jsonl and code_alpaca.json")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, one thread each")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file for the curves of the mixture")
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None:
            parser.error("name the folder with mbpp.jsonl and code_alpaca.json")
        run_all(args)
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def run_all(args: argparse.Namespace) -> None:
    """Run the sweep on the first seed, then the other seeds; write the result after each run, or resume it."""
    torch.set_num_threads(1)
    settings = {"steps": args.steps, "eval_steps": EVAL_STEPS, "max_length": MAX_LENGTH, "batch_size": BATCH_SIZE}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "runs": {}}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if earlier["settings"] == settings and earlier["environment"] == result["environment"]:
            result = earlier
    sweep = [f"{arm} {rate} {SEEDS[0]}" for arm, contender in ARMS.items() for rate in contender.rates]
    _run(sweep, result, args)
    shown = f"mixture {best_rate(result['runs'], 'mixture')} {SEEDS[0]}"
    training_curves(result["runs"][shown]["history"], args.figure)
    _run([f"{arm} {best_rate(result['runs'], arm)} {seed}" for seed in SEEDS[1:] for arm in ARMS], result, args)


def _run(names: list[str], result: dict[str, Any], args: argparse.Namespace) -> None:
    """Run those of the runs that the result does not have yet."""
    left = [name for name in names if name not in result["runs"]]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(run, name, args.steps, args.folder): name for name in left}
        for done in as_completed(runs):
            result["runs"][runs[done]] = done.result()
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            sys.stderr.write(f"{runs[done]}: {mean_loss(done.result()['report']['mixture']):.4f}\n")


def run(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Run ``arm rate seed`` and return its report and its log."""
    torch.set_num_threads(1)
    arm, rate, seed = name.split()
    with tempfile.TemporaryDirectory() as output:
        flags = {
            "model_name": "demo",
            "datasets": "code_alpaca,mbpp",
            "data_dir": folder,
            "max_seq_length": MAX_LENGTH,
            "train_batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "eval_steps": EVAL_STEPS,
            "learning_rate": rate,
            "eval_subset": 50,
            "seed": seed,
            "report_to": "none",
            "disable_tqdm": "true",
            "output_dir": output,
        }
        words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        report = train(parse(TrainConfig, "train", "", [*words, *ARMS[arm].flags]), Console(quiet=True))
        assert report is not None
        state = json.loads((folder_of(Path(output), report.steps) / "trainer_state.json").read_text())
    record = report.model_dump(exclude={"checkpoint"})
    for summary in record["data"]["datasets"]:
        summary["source"] = Path(summary["source"]).name  # a path holds on one machine only
    return {"report": record, "history": state["log_history"]}


def best_rate(runs: dict[str, Any], arm: str) -> str:
    """Return the learning rate with the lowest held-out loss on the first seed."""
    return min(swept(runs, arm), key=lambda rate: mean_loss(runs[f"{arm} {rate} {SEEDS[0]}"]["report"]["mixture"]))


def swept(runs: dict[str, Any], arm: str) -> list[str]:
    """Return the learning rates for which the first seed has runs."""
    return [rate for rate in ARMS[arm].rates if f"{arm} {rate} {SEEDS[0]}" in runs]


def mean_loss(metrics: dict[str, float]) -> float:
    """Return the mean over the domains."""
    return metrics["mean_domain_loss"]


def table(result: dict[str, Any]) -> str:
    """Return the table of held-out losses of each arm at its best learning rate, over the seeds."""
    runs = result["runs"]
    domains = next(iter(runs.values()))["report"]["domains"]
    titles = ["arm", "parameters", "learning rate", *(f"`{domain}`" for domain in domains), "mean", "minus LoRA"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    seeds = [seed for seed in SEEDS if all(f"{arm} {best_rate(runs, arm)} {seed}" in runs for arm in ARMS)]
    found = {arm: [runs[f"{arm} {best_rate(runs, arm)} {seed}"]["report"] for seed in seeds] for arm in ARMS}
    bases = [report["base"] for report in found["lora"]]
    lines.append(_row("base", ["", ""], bases, domains, []))
    for arm, reports in found.items():
        first = [f"{reports[0]['trainable_parameters']:,}", best_rate(runs, arm)]
        others = [] if arm == "lora" else [mean_loss(report["mixture"]) for report in found["lora"]]
        lines.append(_row(ARMS[arm].title, first, [report["mixture"] for report in reports], domains, others))
    report, machine = found["mixture"][0], result["environment"]
    rates = "; ".join(f"{', '.join(swept(runs, arm))} ({arm})" for arm in ARMS)
    over = "one seed" if len(seeds) == 1 else f"mean ± standard deviation over {len(seeds)} seeds"
    lines += [
        "",
        f"Held-out loss in nats per token after {report['steps']} steps of {result['settings']['batch_size']} packed "
        f"row of {result['settings']['max_length']} tokens ({report['train_tokens']:,} tokens), {over}; "
        f"the last column is paired, by seed. Learning rates: the best of "
        f"{rates} on the first seed. "
        f"{report['held_out_rows']:,} held-out rows; SmolLM2-135M-Instruct, float32; "
        f"torch {machine['versions']['torch']}.",
    ]
    return "\n".join(lines)


def _row(title: str, first: list[str], metrics: list[dict[str, float]], domains: list[str], others: list[float]) -> str:
    means = [mean_loss(found) for found in metrics]
    differences = [mean - other for mean, other in zip(means, others, strict=False)]
    cells = [title, *first, *(_spread([found[f"loss/{domain}"] for found in metrics]) for domain in domains)]
    cells += [_spread(means), _spread(differences, "+.4f") if differences else ""]
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float], form: str = ".3f") -> str:
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
