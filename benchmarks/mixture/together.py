"""Study A: one training run on several kinds of text, as one LoRA or as a mixture with as many parameters.

    python -m benchmarks.mixture.together FOLDER --work WORK     measure what is missing, write together.json, print
    python -m benchmarks.mixture.together --show                 print the tables of the committed result

FOLDER holds ``superni`` and ``mbxp``, see ``tasks.py``, and for the control ``code_alpaca_2k.json`` and ``mbpp.jsonl``.
The rate of each arm that decides is swept on a seed of its own with shorter runs, on rows that are not held out, until
the best lies inside the grid.

Said beforehand: the aim is that a shared expert with routed ones under taught routes is at least 1 % below the best
LoRA of as many parameters in mean held-out loss on MBXP or on SuperNI and not above it on the other, with a 95 %
interval below 0 (paired by seed, bootstrap over held-out tasks).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.mixture import arms as apart
from benchmarks.mixture.rows import measured_rows
from benchmarks.mixture.setting import MODEL, Batch, Results, best_on_ladder, tokenize
from benchmarks.mixture.tasks import Task, control, mbxp, superni
from benchmarks.mixture.together_arms import ARMS, Arm, Sizes, extra_of, parameters_of, train
from benchmarks.mixture.together_table import table
from dylo_moe.core import DyLoRA_MoE, load_tokenizer
from dylo_moe.data import TokenCollator, TokenRows
from dylo_moe.skills import extract_features

RESULT = Path(__file__).with_name("together.json")
RATES = [2.5e-4 * 2**step for step in range(8)]
STEPS, SWEEP_STEPS, SWEEP_SEED = 600, 150, 9
TEACH_ROWS = 32
"""Examples of each domain that a router is solved from."""

DEV_ROWS, HELD_OUT_ROWS = 12, 50
"""Rows of each domain that rates are chosen on, and that arms are measured on; the same tasks in all languages."""

POOL = 16
"""Batches whose rows are sorted by length together, so that little is padding."""


class Set:
    """One data set: its rows as tokens.

    Args:
        name: Name of the set.
        tasks: Its domains.
        sizes: Sizes of the arms.
        rows: Rows of a step, which are about 512 tokens.
        work: Folder for tokenized rows.
        tokenizer: The base's tokenizer.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        sizes: Sizes,
        rows: int,
        work: Path,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.name, self.tasks, self.sizes, self.rows = name, tasks, sizes, rows
        self.work, self.tokenizer = work, tokenizer
        self._collate = TokenCollator(tokenizer.pad_token_id)

    def train_batches(self, steps: int, seed: int) -> list[Batch]:
        """Return the batches of a run: equal shares of all domains, rows of similar length together."""
        limit = -(-steps * self.rows // len(self.tasks))
        chosen = random.Random(seed)
        picked: list[tuple[TokenRows, int, int]] = []
        for domain, task in enumerate(self.tasks):
            rows = tokenize(task.train, self.tokenizer, self.work, limit, seed)
            picked += [(rows, index % len(rows), domain) for index in range(limit)]
        chosen.shuffle(picked)
        batches = []
        size = POOL * self.rows
        for first in range(0, steps * self.rows, size):
            pool = sorted(picked[first : min(first + size, steps * self.rows)], key=lambda row: row[0].lengths[row[1]])
            parts = [pool[start : start + self.rows] for start in range(0, len(pool), self.rows)]
            chosen.shuffle(parts)
            batches += parts
        return [self._batch(part) for part in batches]

    def _batch(self, rows: Sequence[tuple[TokenRows, int, int]]) -> Batch:
        batch = self._collate([tokens[index] for tokens, index, _ in rows])
        return {**batch, "domain": torch.tensor([domain for _, _, domain in rows])}

    def teaching_batches(self, seed: int) -> list[Batch]:
        """Return the examples of each domain that a router is solved from."""
        batches = []
        for domain, task in enumerate(self.tasks):
            rows = tokenize(task.train, self.tokenizer, self.work, TEACH_ROWS, seed=100 + seed)
            picked = [(rows, index, domain) for index in range(len(rows))]
            batches += [self._batch(picked[first : first + 8]) for first in range(0, len(picked), 8)]
        return batches

    def held_out(self, dev: bool) -> dict[str, list[Batch]]:
        """Return the held-out rows of each domain in batches, or those that rates are chosen on."""
        found = {}
        for domain, task in enumerate(self.tasks):
            tokens = tokenize(
                task.dev if dev else task.held_out, self.tokenizer, self.work, DEV_ROWS if dev else HELD_OUT_ROWS, 0
            )
            rows = [(tokens, index, domain) for index in range(len(tokens))]
            found[task.name] = [self._batch(rows[first : first + 8]) for first in range(0, len(rows), 8)]
        return found


def run(data: Set, arm: Arm, rate: float, seed: int, steps: int, dev: bool) -> dict[str, Any]:
    """Train an arm, and return what it does on each row of each domain; see ``measured_rows``."""
    torch.manual_seed(seed)
    model = arm.build(data.sizes)
    if arm.teach is not None:
        batches = data.teaching_batches(seed)
        labels = torch.cat([batch["domain"] for batch in batches])
        assert isinstance(model, DyLoRA_MoE)
        arm.teach(model, extract_features(model, batches), labels, seed)
    batches = data.train_batches(steps, seed)
    started = time.monotonic()
    losses = [*tqdm(train(arm, model, batches, rate, seed), total=steps, mininterval=30)]
    seconds = time.monotonic() - started
    tested = apart.Arm(
        model,
        extra=lambda batch, _: extra_of(arm, model, batch),
        routes=apart.router_choice if isinstance(model, DyLoRA_MoE) and not arm.by_label else None,
    )
    domains = {
        name: [row for batch in batches for row in measured_rows(tested, batch, index)]
        for index, (name, batches) in enumerate(data.held_out(dev).items())
    }
    return {
        "tasks": domains,
        "rate": rate,
        "parameters": parameters_of(model),
        "seconds": round(seconds, 1),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "last_loss": round(mean(losses[-50:]), 4),
    }


def mean_loss(found: dict[str, Any]) -> float:
    """Return the mean over domains of the loss, in nats per token."""
    return mean(sum(row[0] for row in rows) / sum(row[1] for row in rows) for rows in found["tasks"].values())


def best_rate(data: Set, name: str, results: Results) -> float:
    """Return the rate of an arm with the lowest loss on rows that are not held out."""

    def loss(rate: float) -> float:
        key = f"{data.name}/rate/{name}/{rate:g}"
        return float(
            results.run(key, lambda: mean_loss(run(data, ARMS[name], rate, SWEEP_SEED, SWEEP_STEPS, dev=True)))
        )

    return best_on_ladder(RATES, RATES.index(2e-3), loss)


SETS = {
    "mbxp": (mbxp, Sizes(16, 9), 2),
    "superni": (lambda folder: superni(folder, definitions=True), Sizes(24, 15), 3),
    "control": (control, Sizes(16, 2), 3),
}


def main() -> None:
    """Read the flags, measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of public data")
    parser.add_argument("--work", type=Path, default=Path("results/mixture"), help="folder for tokenized rows")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.folder is None or not (args.folder / "superni").is_dir():
            parser.error(f"FOLDER must hold superni and mbxp, got {args.folder}")
        results, tokenizer = Results(args.output, environment()), load_tokenizer(MODEL)
        for name in args.sets:
            read, sizes, rows = SETS[name]
            data = Set(name, read(args.folder), sizes, rows, args.work / name, tokenizer)
            for arm in args.arms:
                for seed in args.seeds:
                    key = f"{name}/{seed}/{arm}"
                    if key in results.content["runs"]:
                        continue
                    rate = best_rate(data, ARMS[arm].rate_of, results)
                    sys.stderr.write(f"{key}, rate {rate:g}\n")
                    results.run(
                        key,
                        lambda data=data, arm=arm, rate=rate, seed=seed: run(
                            data, ARMS[arm], rate, seed, STEPS, dev=False
                        ),
                    )
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


if __name__ == "__main__":
    main()
