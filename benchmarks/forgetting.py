"""What a stream of skills costs the older ones: ours beside sequential LoRA, replay, an oracle and joint training.

    python benchmarks/forgetting.py [FOLDER]      measures, writes benchmarks/results/forgetting.json, prints the tables
    python benchmarks/forgetting.py --show        prints the tables of the committed result

FOLDER may hold ``mbpp.jsonl`` and ``code_alpaca.json``; the other skills are this machine's own, see
``forgetting_skills.py``. Each arm trains the same number of steps on the same batches of each skill. After each skill
all skills are measured on held-out rows:

    ours         one expert a skill, ``acquire_skill``, routed by the closed-form gate, top-1
    oracle       the same experts, each example sent to its own skill's
    sequential   one LoRA that learns one skill after the other
    replay       the same, where 1 % of the rows are of the skills before
    joint        one LoRA on the rows of all skills mixed, as many steps in all

Not covered: GPUs, larger models, skills that are nearer to each other than these, and the cost of 50 experts.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forgetting_skills import stream
from result_file import environment, parse_flags
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from dylo_moe.core.base_model import load_base_model, load_tokenizer
from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.data.prepare_data import PreparedData, prepare_data
from dylo_moe.skills.acquisition import Look, SkillData, acquire_skill, look
from dylo_moe.skills.gates import Gate, GradientGate, RidgeGate
from dylo_moe.skills.library import MEASURES, SkillLibrary
from dylo_moe.skills.metrics import (
    average_performance,
    backward_transfer,
    forgetting,
    relative_forgetting,
    routing_accuracy,
)

RESULT = Path(__file__).parent / "results" / "forgetting.json"
MODEL, MAX_LENGTH, BATCH_SIZE, RANK, RATE = "demo", 256, 8, 16, 2e-3
REPLAYED = 0.01
SAMPLE = 128
GATES = {"closed form": 0, "gradient": 0, "gradient, replay": 2000}

Batch = dict[str, Tensor]


class Rows:
    """Batches of the rows of all skills."""

    def __init__(self, data: list[PreparedData], pad: int, seed: int, held_out: int) -> None:
        self.data, self._collate, self.held_out_rows = data, TokenCollator(pad), held_out
        self._random = np.random.default_rng(seed)
        self.orders = [self._random.permutation(len(one.train)) for one in data]

    def train(self, skill: int, steps: int, old: float = 0.0) -> Iterator[Batch]:
        """Batches of one skill, in which a row is with probability ``old`` one of a skill before."""
        random = np.random.default_rng([skill, steps])
        for step in range(steps):
            rows = []
            for place in range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE):
                source = int(random.integers(skill)) if skill and random.random() < old else skill
                order = self.orders[source]
                rows.append(self.data[source].train[int(order[place % len(order)])])
            yield self._batch(rows)

    def joint(self, steps: int) -> Iterator[Batch]:
        """Batches in which each skill has as many rows."""
        random = np.random.default_rng(steps)
        for step in range(steps):
            chosen = random.integers(len(self.data), size=BATCH_SIZE)
            orders = [self.orders[skill] for skill in chosen]
            places = [order[(step * BATCH_SIZE + place) % len(order)] for place, order in enumerate(orders)]
            yield self._batch([self.data[skill].train[int(row)] for skill, row in zip(chosen, places, strict=True)])

    def sample(self, rows: TokenRows, count: int) -> list[Batch]:
        """The first rows of a set, as batches."""
        count = min(count, len(rows))
        return [
            self._batch([rows[index] for index in range(first, min(first + BATCH_SIZE, count))])
            for first in range(0, count, BATCH_SIZE)
        ]

    def held_out(self, skill: int) -> list[Batch]:
        """Held-out rows of a skill."""
        return self.sample(self.data[skill].validation, self.held_out_rows)

    def _batch(self, rows: Sequence[Any]) -> Batch:
        batch = self._collate(rows)
        del batch["domain"]
        return batch


def main() -> None:
    """Reads the flags, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where mbpp.jsonl and code_alpaca.json may be")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps for each skill")
    parser.add_argument("--held-out", type=int, default=96, help="held-out rows of each skill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=6, help="skills, at most")
    args = parse_flags(parser, RESULT)
    if not args.show:
        with tempfile.TemporaryDirectory() as scratch:
            args.output.write_text(json.dumps(measure(args, Path(scratch)), indent=2) + "\n")
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All seeds."""
    console, tokenizer = Console(stderr=True), load_tokenizer(MODEL)
    skills = dict(list(stream(scratch, args.folder).items())[: args.most])
    console.print(f"Skills: {', '.join(skills)}", highlight=False)
    data = [prepare_data([wanted], tokenizer, max_length=MAX_LENGTH) for wanted in skills.values()]
    result: dict[str, Any] = {"environment": environment(), "skills": list(skills), "steps": args.steps, "seeds": {}}
    for seed in args.seeds:
        console.print(f"Seed {seed}", highlight=False)
        rows = Rows(data, tokenizer.pad_token_id, seed, args.held_out)
        arms, routing = ours(rows, list(skills), args.steps, seed)
        arms["sequential"] = sequential(rows, args.steps, seed, 0.0)
        arms["replay"] = sequential(rows, args.steps, seed, REPLAYED)
        arms["joint"] = joint(rows, args.steps, seed)
        result["seeds"][str(seed)] = {"losses": arms, "routing": routing}
    return result


def new_model(seed: int) -> DyLoRA_MoE:
    """One expert on the base."""
    set_seed(seed)
    return DyLoRA_MoE(load_base_model(MODEL), 1, rank=RANK, routing="prefix", balance_coefficient=0.0)


def train(model: DyLoRA_MoE, batches: Iterator[Batch]) -> None:
    """AdamW on what trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch, return_logits=False).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def loss_of(model: DyLoRA_MoE, batches: list[Batch]) -> float:
    """Nats per labelled token."""
    total, count = 0.0, 0
    for batch in batches:
        labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(model(**batch, return_logits=False).lm_loss) * labelled
        count += labelled
    return total / count


def row_of(model: DyLoRA_MoE, rows: Rows) -> list[float]:
    """The loss of each skill now."""
    return [loss_of(model, rows.held_out(skill)) for skill in range(len(rows.data))]


def ours(rows: Rows, names: list[str], steps: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses of ours and of the oracle after each skill, and how the gates and the novelty did."""
    model = new_model(seed)
    library = SkillLibrary(model.router.hidden_size)
    losses: list[list[float]] = []
    for skill, name in enumerate(names):
        one = SkillData(name, rows.sample(rows.data[skill].train, SAMPLE), rows.held_out(skill))
        learn = rows.train(skill, steps)
        acquire_skill(model, library, one, lambda _, learn=learn: _trained(model, learn), extend=False, rank=RANK)
        losses.append(row_of(model, rows))
    oracle = []
    for skill, expert in enumerate(model.experts.names):
        model.experts.set_active(expert)
        oracle.append(loss_of(model, rows.held_out(skill)))
    model.experts.activate_all()
    aurocs = {measure: library.pair_aurocs(measure).nan_to_num(1.0).tolist() for measure in MEASURES}
    return {"ours": losses, "oracle": oracle}, {"gates": gates(model, rows, seed), "auroc": aurocs}


def _trained(model: DyLoRA_MoE, batches: Iterator[Batch]) -> bool:
    train(model, batches)
    return True


def gates(model: DyLoRA_MoE, rows: Rows, seed: int) -> dict[str, Any]:
    """Routing accuracy per token and per example of each gate, taught the skills one after the other."""
    width, found = model.router.hidden_size, {}
    seen = [look(model, rows.sample(one.train, SAMPLE)) for one in rows.data]
    held_out = [look(model, rows.held_out(skill)) for skill in range(len(rows.data))]
    for name, replay in GATES.items():
        gate: Gate = RidgeGate(width) if name == "closed form" else GradientGate(width, replay, seed=seed)
        for skill, one in enumerate(seen):
            gate.learn(one.tokens, skill)
        found[name] = _accuracy(gate, held_out)
    return found


def _accuracy(gate: Gate, held_out: list[Look]) -> tuple[float, float]:
    weight, first = gate.weight().float(), np.cumsum([0, *(len(one.embeddings) for one in held_out)])
    shares = torch.cat([(one.tokens @ weight.T).softmax(dim=-1) for one in held_out]).numpy()
    right = np.repeat(np.arange(len(held_out)), [len(one.tokens) for one in held_out])
    example = np.concatenate([one.example.numpy() + start for one, start in zip(held_out, first, strict=False)])
    return routing_accuracy(shares, right, example)


def sequential(rows: Rows, steps: int, seed: int, old: float) -> list[list[float]]:
    """One adapter that learns one skill after the other."""
    model, losses = new_model(seed), []
    for skill in range(len(rows.data)):
        train(model, rows.train(skill, steps, old))
        losses.append(row_of(model, rows))
    return losses


def joint(rows: Rows, steps: int, seed: int) -> list[float]:
    """One adapter on everything."""
    model = new_model(seed)
    train(model, rows.joint(steps * len(rows.data)))
    return row_of(model, rows)


def table(result: dict[str, Any]) -> str:
    """Means over the seeds, as Markdown."""
    runs = list(result["seeds"].values())
    lines = [
        f"Skills in order: {', '.join(result['skills'])}; {result['steps']} steps each, {len(runs)} seeds.\n",
        "| arm | average loss | worst relative forgetting | forgetting (nats) | backward transfer (nats) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in ("ours", "sequential", "replay"):
        streams = [run["losses"][arm] for run in runs]
        lines.append(
            f"| {arm} | {_mean(map(average_performance, streams)):.3f} "
            f"| {max(max(relative_forgetting(one, lower_is_better=True)) for one in streams):+.2%} "
            f"| {_mean(forgetting(one, lower_is_better=True) for one in streams):+.4f} "
            f"| {_mean(backward_transfer(one, lower_is_better=True) for one in streams):+.4f} |"
        )
    for arm in ("oracle", "joint"):
        lines.append(f"| {arm} | {_mean(statistics.fmean(run['losses'][arm]) for run in runs):.3f} | | | |")
    lines += ["", "| gate | tokens | examples |", "| --- | --- | --- |"]
    for name in GATES:
        figures = [run["routing"]["gates"][name] for run in runs]
        lines.append(f"| {name} | {_mean(one[0] for one in figures):.1%} | {_mean(one[1] for one in figures):.1%} |")
    lines += ["", "| novelty by | mean AUROC | worst pair, known then new |", "| --- | --- | --- |"]
    for measure in MEASURES:
        tables = np.mean([run["routing"]["auroc"][measure] for run in runs], axis=0)
        known, new = np.unravel_index(tables.argmin(), tables.shape)
        pairs = tables[~np.eye(len(tables), dtype=bool)]
        worst = f"{tables.min():.3f}: {result['skills'][known]}, {result['skills'][new]}"
        lines.append(f"| {measure} | {pairs.mean():.3f} | {worst} |")
    return "\n".join(lines)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
