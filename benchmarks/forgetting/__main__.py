"""Loss of older skills along a stream: ours, sequential LoRA, replay, an oracle and joint training.

    python -m benchmarks.forgetting FOLDER      measure, write benchmarks/forgetting/forgetting.json, draw the figure
    python -m benchmarks.forgetting --show      print the tables of the committed result

FOLDER contains ``mbpp.jsonl`` and ``code_alpaca.json``; the other skills come from this machine's files, see
``skills.py``. All arms train the same number of steps on each skill. After each skill they are evaluated on
held-out rows of the skills so far:

    ours         one expert per skill, ``acquire_skill``, routed by the closed-form gate, top-1
    oracle       the same experts, each example sent to its own skill's expert
    sequential   one LoRA that learns one skill after the other
    replay       the same, with 1 % of the rows from earlier skills
    joint        one LoRA on the rows of all skills mixed, for the same total number of steps

Covered: a base in bfloat16 on the CPU, experts in float32. Not covered: GPUs, larger models, longer training.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.forgetting.gates import closed_form, gates, novelty
from benchmarks.forgetting.report import draw, tables
from benchmarks.forgetting.skills import stream
from dylo_moe.config.skills import AcquireArgs
from dylo_moe.core.base.loading import load_base_model, load_tokenizer
from dylo_moe.core.base.structure import decoder_layers
from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.data.pipeline import PreparedData, prepare_data
from dylo_moe.skills.acquisition import SkillData, SkillFeatures, acquire_skill, extract_features
from dylo_moe.skills.library import SkillLibrary
from dylo_moe.spec.routing_mode import RoutingMode

RESULT = Path(__file__).with_name("forgetting.json")
FIGURE = Path(__file__).parents[2] / "docs" / "forgetting.png"
ROUTING = "context"
ARMS = ("ours", "sequential", "replay", "joint")
MODEL, RANK, RATE, REPLAYED = "demo", 16, 2e-3, 0.01
MAX_LENGTH, BATCH_SIZE = 192, 8
GATE_ROWS = 64
"""Rows per skill to compare gates with; ``acquire`` uses ``--sample_rows``."""

Batch = dict[str, Tensor]


class Rows:
    """Batches of the rows of all skills, in an order that a seed draws."""

    def __init__(self, skills: dict[str, str], seed: int, held_out: int) -> None:
        tokenizer = load_tokenizer(MODEL)
        self.names = list(skills)
        self.data: list[PreparedData] = [
            prepare_data([wanted], tokenizer, max_length=MAX_LENGTH) for wanted in skills.values()
        ]
        self._collate, self._held_out = TokenCollator(tokenizer.pad_token_id), held_out
        random = np.random.default_rng(seed)
        self._orders = [random.permutation(len(one.train)) for one in self.data]

    def train(self, skill: int, steps: int, old: float = 0.0) -> Iterator[Batch]:
        """Yield batches of one skill; with probability ``old`` a row comes from an earlier skill."""
        random = np.random.default_rng([skill, steps])
        for step in range(steps):
            sources = [
                int(random.integers(skill)) if skill and random.random() < old else skill for _ in range(BATCH_SIZE)
            ]
            yield self._of(sources, step)

    def joint(self, steps: int) -> Iterator[Batch]:
        """Yield batches in which each row comes from a skill drawn uniformly."""
        random = np.random.default_rng(steps)
        for step in range(steps):
            yield self._of(random.integers(len(self.data), size=BATCH_SIZE).tolist(), step)

    def sample(self, skill: int, count: int = AcquireArgs.sample_rows) -> list[Batch]:
        """Return training rows, for the novelty check and for the gate."""
        return self._first(self.data[skill].train, count)

    def held_out(self, skill: int) -> list[Batch]:
        """Return held-out rows of a skill."""
        return self._first(self.data[skill].validation, self._held_out)

    def _of(self, sources: list[int], step: int) -> Batch:
        places = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        orders = [(source, self._orders[source]) for source in sources]
        return self._batch(
            [
                self.data[source].train[int(order[place % len(order)])]
                for place, (source, order) in zip(places, orders, strict=True)
            ]
        )

    def _first(self, rows: TokenRows, count: int) -> list[Batch]:
        chosen = [rows[index] for index in range(min(count, len(rows)))]
        return [self._batch(chosen[first : first + BATCH_SIZE]) for first in range(0, len(chosen), BATCH_SIZE)]

    def _batch(self, rows: Sequence[Any]) -> Batch:
        batch = self._collate(rows)
        del batch["domain"]
        return batch


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with mbpp.jsonl and code_alpaca.json")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps for each skill")
    parser.add_argument("--held_out", type=int, default=40, help="held-out rows of each skill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, one thread each")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None:
            parser.error("name the folder with mbpp.jsonl and code_alpaca.json")
        with tempfile.TemporaryDirectory() as scratch:
            measure(args, stream(Path(scratch), args.folder))
    result = json.loads(args.output.read_text())
    if not args.show:
        draw(result, args.figure)
    for table in tables(result).values():
        sys.stdout.write(table + "\n\n")


def measure(args: argparse.Namespace, skills: dict[str, str]) -> None:
    """Run every arm on every seed; write the result after each run, and resume an earlier one."""
    torch.set_num_threads(1)
    rows = Rows(skills, 0, args.held_out)
    settings = {
        "skills": {name: [len(one.train), len(one.validation)] for name, one in zip(skills, rows.data, strict=True)},
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "rank": RANK,
        "learning_rate": RATE,
        "replayed": REPLAYED,
        "held_out": args.held_out,
    }
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "runs": {}}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if earlier["settings"] == settings and earlier["environment"] == result["environment"]:
            result = earlier
    left = [name for seed in args.seeds for arm in ARMS if (name := f"{arm} {seed}") not in result["runs"]]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(run, name, skills, args.steps, args.held_out): name for name in left}
        for done in as_completed(runs):
            result["runs"][runs[done]] = done.result()
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            sys.stderr.write(f"{runs[done]}: done\n")


def run(name: str, skills: dict[str, str], steps: int, held_out: int) -> dict[str, Any]:
    """Run ``arm seed`` and return the losses after each skill, of the skills so far."""
    torch.set_num_threads(1)
    arm, seed = name.split()
    rows = Rows(skills, int(seed), held_out)
    if arm == "ours":
        return ours(rows, steps, int(seed))
    model = new_model(int(seed))
    if arm == "joint":
        train(model, rows.joint(steps * len(skills)))
        return {"losses": [losses_of(model, rows, len(skills))]}
    losses = []
    for skill in range(len(skills)):
        train(model, rows.train(skill, steps, REPLAYED if arm == "replay" else 0.0))
        losses.append(losses_of(model, rows, skill + 1))
    return {"losses": losses}


def new_model(seed: int) -> DyLoRA_MoE:
    """Return a mixture with one expert on the base."""
    set_seed(seed)
    base = load_base_model(MODEL, dtype=torch.bfloat16)
    return DyLoRA_MoE(base, 1, rank=RANK, routing=ROUTING, balance_coefficient=0.0)


def train(model: DyLoRA_MoE, batches: Iterator[Batch]) -> bool:
    """Train by AdamW, with a learning rate that falls linearly to a tenth; return True, as ``acquire_skill`` needs."""
    every = list(batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, len(every))
    model.train()
    for batch in every:
        optimizer.zero_grad()
        model(**batch, return_logits=False).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return True


@torch.no_grad()
def loss_of(model: DyLoRA_MoE, batches: list[Batch]) -> float:
    """Return the loss in nats per labelled token."""
    total, count = 0.0, 0
    for batch in batches:
        labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(model(**batch, return_logits=False).lm_loss) * labelled
        count += labelled
    return total / count


def losses_of(model: DyLoRA_MoE, rows: Rows, count: int) -> list[float]:
    """Return the current loss of each of the first ``count`` skills."""
    return [loss_of(model, rows.held_out(skill)) for skill in range(count)]


def ours(rows: Rows, steps: int, seed: int) -> dict[str, Any]:
    """Return losses of the base, ours and the oracle, the accuracy of the gates, and the AUROC of novelty."""
    model = new_model(seed)
    with model.base_only():
        base = losses_of(model, rows, len(rows.names))
    library = SkillLibrary(model.router.hidden_size)
    losses: list[list[float]] = []
    for skill, name in enumerate(rows.names):
        one = SkillData(name, rows.sample(skill), rows.held_out(skill))
        learn = rows.train(skill, steps)
        acquire_skill(model, library, one, lambda _, learn=learn: train(model, learn), extend=False, rank=RANK)
        losses.append(losses_of(model, rows, skill + 1))
    oracle = []
    for skill, expert in enumerate(model.experts.names):
        model.experts.set_active(expert)
        oracle.append(loss_of(model, rows.held_out(skill)))
    model.experts.activate_all()
    seen, held_out = looks(model, rows)
    found = gates(seen, held_out, seed)
    for name, weight in found.weights.items():
        with torch.no_grad():
            model.router.gates[0].copy_(weight)
        found.figures[name]["losses"] = losses_of(model, rows, len(rows.names))
    for routing in ("prefix", "final"):
        model.routing_mode = RoutingMode.parse(routing, len(decoder_layers(model.experts.base_model)))
        found.figures[f"closed form, `{routing}`"] = closed_form(*looks(model, rows))
    return {
        "base": base,
        "losses": losses,
        "oracle": oracle,
        "gates": found.figures,
        "auroc": novelty(library, seen, held_out),
    }


def looks(model: DyLoRA_MoE, rows: Rows) -> tuple[list[SkillFeatures], list[SkillFeatures]]:
    """Return the base model's features of training rows and of held-out rows, for each skill."""
    skills = range(len(rows.names))
    seen = [extract_features(model, rows.sample(skill, GATE_ROWS)) for skill in skills]
    return seen, [extract_features(model, rows.held_out(skill)) for skill in skills]


if __name__ == "__main__":
    main()
