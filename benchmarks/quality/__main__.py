"""Held-out loss at equal wall-clock time: three routing modes and plain LoRA of the same total rank.

    python -m benchmarks.quality             train, write benchmarks/quality/quality.json, print the table
    python -m benchmarks.quality --show      print the table of the committed result
    python -m benchmarks.quality --seconds 8 --sweep-seconds 4 --held-out 1 --seeds 0 --output /tmp/quality.json  try it

Mixtures of 4 experts of rank 16, and one LoRA of rank 64 on the same projections with the same alpha / rank, train on
the two domains of ``recipes/demo.yaml`` for the same time each, in turns in one process, on the same batches in the
same order. A faster arm takes more steps. Under ``prefix`` the first quarter of the layers has no experts, so that mode
has three quarters of the parameters. A sweep on a separate seed finds each arm's learning rate. It trains for as long
as the measurement does, because the best rate falls with the number of steps. All plain LoRA arms share the rate of
r=64, as their steps and scale are the same.

Covered: minutes of training in float32 on the CPU, on a small model and two domains that are easy to separate. Not
covered: GPUs, where the arms' relative speeds differ; long training; other ranks, targets and numbers of experts; and
uses of a mixture other than loss, such as adding a skill later.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.quality.arms import (
    BATCH_SIZE,
    ENTRIES,
    EXPERT_RANK,
    MAX_LENGTH,
    NUM_EXPERTS,
    TARGETS,
    Arm,
    Data,
    plain_nats,
)
from dylo_moe.core.base.loading import load_base_model, load_tokenizer

RESULT = Path(__file__).with_name("quality.json")
MODEL = "demo"
DOMAINS = ["python_stdlib", "cpp_headers"]
SWEEP_SEED = 100
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
REFERENCE = "lora_64"
MIXTURES = [name for name, entry in ENTRIES.items() if entry.routing is not None]
SWEPT = sorted({entry.rate_of for entry in ENTRIES.values()}, key=list(ENTRIES).index)

Report = Callable[[str, float], object]


def main() -> None:
    """Read the flags, run, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75.0, help="training time of each arm under each seed")
    parser.add_argument(
        "--sweep-seconds", type=float, default=75.0, help="training time of each arm and rate in the sweep"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--held-out", type=float, default=3.0, help="percentage of the held-out rows, chosen by the seed"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid of the sweep")
    args = parse_flags(parser, RESULT)
    if SWEEP_SEED in args.seeds:
        parser.error(f"--seeds must not include {SWEEP_SEED}, the sweep's seed, on which the learning rates are chosen")
    if not args.show:
        # one progress bar is enough; PEFT uses a deprecated name of transformers
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        run(args, Console(stderr=True))
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def run(args: argparse.Namespace, console: Console) -> None:
    """Run the sweep, then the seeds; write the result after each."""
    base, tokenizer = load_base_model(MODEL).eval(), load_tokenizer(MODEL)
    data = Data(DOMAINS, tokenizer, args.held_out, SWEEP_SEED)
    start = time.perf_counter()
    sweep_base = data.held_out_losses(partial(plain_nats, base))
    evaluation = time.perf_counter() - start
    training = len(SWEPT) * len(args.rates) * args.sweep_seconds + len(args.seeds) * len(ENTRIES) * args.seconds
    minutes = (training + evaluations(len(args.rates), len(args.seeds)) * evaluation) / 60
    console.print(f"About {minutes:.0f} minutes, of which {training / 60:.0f} train", highlight=False)
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training)

        def report(title: str, text: str, seconds: float) -> None:
            progress.update(task, description=f"{title}, {text}", advance=seconds)

        result = load_or_start(args)
        if not result["runs"]:
            result["sweep"]["base"] = sweep_base
            sweep(result["sweep"], base, data, args, partial(report, "sweep"))
            write(args.output, result)
        rates = result["sweep"]["best"]
        done = [seed_run["seed"] for seed_run in result["runs"]]
        for seed in [seed for seed in args.seeds if seed not in done]:
            seed_run = run_seed(base, tokenizer, seed, rates, args, partial(report, f"seed {seed}"))
            result["runs"].append(seed_run)
            write(args.output, result)


def load_or_start(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of an earlier run with these settings on this machine; an empty result otherwise."""
    sweep = {"losses": {name: {} for name in SWEPT}}
    begun: dict[str, Any] = {"environment": environment(), "settings": settings(args), "sweep": sweep, "runs": []}
    if args.output.exists():
        earlier: dict[str, Any] = json.loads(args.output.read_text())
        if all(earlier[key] == begun[key] for key in ("environment", "settings")):
            return earlier
    return begun


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the result depends on, besides the code and the environment."""
    return {
        "model": MODEL,
        "domains": DOMAINS,
        "seconds": args.seconds,
        "sweep_seconds": args.sweep_seconds,
        "sweep_seed": SWEEP_SEED,
        "held_out_percent": args.held_out,
        "max_length": MAX_LENGTH,
        "batch_size": BATCH_SIZE,
        "num_experts": NUM_EXPERTS,
        "expert_rank": EXPERT_RANK,
        "target_modules": TARGETS,
    }


def evaluations(rates: int, seeds: int) -> int:
    """Return the cost of all evaluations in units of the base's; a forward under ``final`` is two passes."""
    sweep_arms = len(SWEPT) + sum(name in MIXTURES for name in SWEPT) + 2
    seed_arms = len(ENTRIES) + len(MIXTURES) + 2
    return rates * sweep_arms + seeds * (1 + seed_arms)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result, creating its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def sweep(result: dict[str, Any], base: PreTrainedModel, data: Data, args: argparse.Namespace, report: Report) -> None:
    """Add the mean held-out loss of each arm at each missing rate to the result, and the best rates."""
    for name in SWEPT:
        losses: dict[str, float] = result["losses"][name]
        arms = {
            f"{name} {rate:g}": ENTRIES[name].build(base, SWEEP_SEED, rate, args.sweep_seconds)
            for rate in args.rates
            if f"{rate:g}" not in losses
        }
        train_together(arms, data, report)
        losses |= {
            f"{arm.rate:g}": mean_loss(intended_losses(evaluate(title, arm, data, report)))
            for title, arm in arms.items()
        }
    result["best"] = {name: float(min(losses, key=losses.get)) for name, losses in result["losses"].items()}


def run_seed(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    rates: dict[str, float],
    args: argparse.Namespace,
    report: Report,
) -> dict[str, Any]:
    """Train and evaluate all arms under one seed."""
    report("base", 0.0)
    data = Data(DOMAINS, tokenizer, args.held_out, seed)
    base_losses = data.held_out_losses(partial(plain_nats, base))
    arms = {name: entry.build(base, seed, rates[entry.rate_of], args.seconds) for name, entry in ENTRIES.items()}
    train_together(arms, data, report)
    reports = {name: {**arm.report(), "losses": evaluate(name, arm, data, report)} for name, arm in arms.items()}
    return {"seed": seed, "held_out_rows": data.held_out_rows(), "base": base_losses, "arms": reports}


def train_together(arms: dict[str, Arm], data: Data, report: Report) -> None:
    """Train all arms in turns until their time is used up, so that a slow machine slows all of them equally."""
    for name, arm in arms.items():
        report(f"{name}: warm-up", 0.0)
        arm.warm_up(data.train_batch(0))
    # garbage collection over hundreds of thousands of module objects would cost one arm time
    gc.collect()
    gc.freeze()
    while not all(arm.finished for arm in arms.values()):
        for name, arm in arms.items():
            before = arm.used
            report(name, 0.0)
            arm.run_slice(data)
            report(name, arm.used - before)
    gc.unfreeze()


def evaluate(name: str, arm: Arm, data: Data, report: Report) -> dict[str, dict[str, float]]:
    """Return the held-out losses of an arm, and report progress."""
    report(f"{name}: evaluation", 0.0)
    return arm.held_out(data)


def intended_losses(losses: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the losses of the way in which an arm is used: sparse for a mixture, plain otherwise."""
    return losses["sparse"] if "sparse" in losses else losses["plain"]


def mean_loss(losses: dict[str, float]) -> float:
    """Return the mean over the domains."""
    return statistics.mean(losses.values())


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table and its verdict on the routing modes."""
    runs, domains, seconds = result["runs"], result["settings"]["domains"], result["settings"]["seconds"]
    titles = ["arm", "learning rate", "steps", *(f"`{domain}`" for domain in domains), "mean", "minus LoRA r=64"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    lines.append(_row("base", ["", ""], [run["base"] for run in runs], runs))
    for name, entry in ENTRIES.items():
        reports = [run["arms"][name] for run in runs]
        steps = f"{statistics.mean(report['steps'] for report in reports):.0f}"
        for way in reports[0]["losses"]:
            title = entry.title if way == "plain" else f"{entry.title}, {way}"
            first = [f"{reports[0]['learning_rate']:g}", steps]
            lines.append(_row(title, first, [report["losses"][way] for report in reports], runs))
    lines += [
        "",
        f"Held-out loss in nats per token after {seconds:g} s of training per arm, mean ± standard deviation over "
        f"{len(runs)} seeds; the last column is paired, by seed. Sparse is top-2 of {NUM_EXPERTS} experts, dense is as "
        f"trained. {_edges(result['sweep']['losses'], result['sweep']['best'])}",
        "",
        verdict(runs),
    ]
    return "\n".join(lines)


def _row(title: str, first: list[str], losses: list[dict[str, float]], runs: list[dict[str, Any]]) -> str:
    means = [mean_loss(loss) for loss in losses]
    reference = [mean_loss(run["arms"][REFERENCE]["losses"]["plain"]) for run in runs]
    differences = [mean - other for mean, other in zip(means, reference, strict=True)]
    domains = [_spread([loss[domain] for loss in losses]) for domain in losses[0]]
    cells = [title, *first, *domains, _spread(means), _spread(differences, "+.4f") if any(differences) else ""]
    return "| " + " | ".join(cells) + " |"


def _edges(losses: dict[str, dict[str, float]], best: dict[str, float]) -> str:
    """Return which best learning rates lie at the edge of the grid, where a better one may lie outside."""
    rates = sorted(map(float, next(iter(losses.values()))))
    edge = [f"`{name}`" for name in losses if best[name] in (rates[0], rates[-1])]
    where = f"at the edge of the grid for {', '.join(edge)}" if edge else "inside the grid for every arm"
    return f"Learning rates from a sweep over {', '.join(f'{rate:g}' for rate in rates)}; the best one is {where}."


def verdict(runs: list[dict[str, Any]]) -> str:
    """Return which routing mode is best, and whether by more than the spread over the seeds."""
    losses = {name: [mean_loss(intended_losses(run["arms"][name]["losses"])) for run in runs] for name in MIXTURES}
    best, second = sorted(losses, key=lambda name: statistics.mean(losses[name]))[:2]
    lead = [theirs - ours for ours, theirs in zip(losses[best], losses[second], strict=True)]
    sentence = f"Best routing mode by mean sparse loss: `{best}`, ahead of `{second}` by {_spread(lead, '.4f')}"
    if len(lead) < 2:
        return f"{sentence}; one seed does not show whether that is more than chance."
    more = "exceeds" if statistics.mean(lead) > statistics.stdev(lead) else "does not exceed"
    return f"{sentence} (paired, by seed), which {more} the spread over the seeds."


def _spread(values: list[float], form: str = ".3f") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form.lstrip('+')}}"


if __name__ == "__main__":
    main()
