"""Cost of training a new skill in a mixture that already has 5 or 50 experts.

    python -m benchmarks.forgetting.skill_cost           measure, write skill_cost.json, print the table
    python -m benchmarks.forgetting.skill_cost --show    print the table of the committed result

It times three parts in turns: an optimizer step on one batch as ``acquire_skill`` takes it, extracting the features of
a batch for novelty and routing, and solving the router. Run it on a quiet machine. Covered: float32 on the CPU.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.common.timing import Timed, interleaved, ratios
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.skills.acquisition import extract_features, training_only
from dylo_moe.skills.ridge_gate import RidgeGate

RESULT = Path(__file__).with_name("skill_cost.json")
COUNTS, RANK, BATCH, LENGTH, TOKENS = (5, 50), 16, 4, 128, 256
TITLES = {
    "a step": "training step",
    "a look at a batch": "features of a batch",
    "the router": "solving the router",
}
"""Titles in the table of the parts, by their names in the result."""


def main() -> None:
    """Read the flags, measure, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse_flags(parser, RESULT)
    if not args.show:
        args.output.write_text(json.dumps(measure(args.rounds), indent=2) + "\n")
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def measure(rounds: int) -> dict[str, Any]:
    """Measure the seconds of each part with each number of experts."""
    console = Console(stderr=True)
    entries: dict[str, Timed] = {}
    with ExitStack() as learning:
        for count in COUNTS:
            parts = calls_to_time(count, learning)
            entries |= {f"{part}, {count} experts": Timed(call, rounds) for part, call in parts.items()}
        seconds = interleaved(entries, progress=lambda text: console.print(text, highlight=False))
    found = {
        part: ratios({f"{count}": seconds[f"{part}, {count} experts"] for count in COUNTS}, str(COUNTS[0]))
        for part in parts
    }
    setup = {"rank": RANK, "batch": BATCH, "length": LENGTH, "tokens of a skill": TOKENS}
    return {"environment": environment(), "setup": setup, "seconds": seconds, "ratios": found}


def calls_to_time(count: int, learning: ExitStack) -> dict[str, Any]:
    """Return the calls to time, on a model with ``count`` experts and a new one, which ``learning`` makes train."""
    torch.manual_seed(0)
    model = DyLoRA_MoE(load_base_model("demo"), 1, rank=RANK, routing="context")
    for _ in range(count):
        model.add_expert(rank=RANK)
    model.set_maturity()
    new = model.experts.names[-1]
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gate = RidgeGate(model.router.hidden_size)
    for expert in range(count + 1):
        gate.learn(torch.randn(TOKENS, model.router.hidden_size), expert)
    learning.enter_context(training_only(model, new))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(**batch, labels=ids, return_logits=False).loss.backward()
        optimizer.step()

    return {"a step": step, "a look at a batch": lambda: extract_features(model, [batch]), "the router": gate.weight}


def table(result: dict[str, Any]) -> str:
    """Return the medians of the ratios as a Markdown table."""
    few, many = COUNTS
    lines = [f"| part | {many} experts relative to {few}, median | quartiles |", "| --- | --- | --- |"]
    for part, found in result["ratios"].items():
        ratio = found[str(many)]
        low, high = ratio["quartiles"]
        lines.append(f"| {TITLES[part]} | {ratio['median']:.3f} | {low:.3f} to {high:.3f} |")
    setup, machine = result["setup"], result["environment"]
    lines += [
        "",
        f"{setup['batch']} rows of {setup['length']} tokens, rank {setup['rank']}, SmolLM2-135M-Instruct in float32, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}; rounds interleaved.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
