"""What preprocessing does with real data, how fast it is, and what packing gains.

    python -m benchmarks.data FOLDER          measure, write benchmarks/data/data.json, print the tables
    python -m benchmarks.data --show          print the tables of the committed result

FOLDER contains ``mbpp.jsonl`` (Google's, 974 rows) and ``code_alpaca.json`` (any part of Code Alpaca). Preprocessing
runs in a separate process with an empty cache. Training throughput counts labelled tokens, the ones with a loss. It
compares packed with padded rows on the same model; each round times every contender once.

Covered: float32 on the CPU, SmolLM2-135M. Not covered: GPUs, where padding has another cost.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.common.timing import Timed, interleaved, spread
from benchmarks.data.tables import tables
from dylo_moe.core.base.loading import load_base_model, load_tokenizer
from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.data.mixing import MixingSampler
from dylo_moe.data.packing import TokenCollator
from dylo_moe.data.pipeline import PreparedData, prepare_data
from dylo_moe.data.templates import template_of

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_name("data.json")
MODEL, NAMES = "demo", ("code_alpaca", "mbpp")
MAX_LENGTH, BATCH_SIZE = 1024, 2
SCALES = (10_000, 100_000, 1_000_000)
ROUNDS = 7
BATCHES = {"packed": 2, "padded": 10, "padded, similar lengths together": 10, "padded to the full length": 2}
"""Number of batches of each contender that a round times, a few seconds' worth."""

Batch = dict[str, Tensor]


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with mbpp.jsonl and code_alpaca.json")
    parser.add_argument("--scales", type=int, nargs="*", default=list(SCALES), help="rows of the synthetic datasets")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parse_flags(parser, RESULT)
    if args.child:
        sys.stdout.write(json.dumps(preprocess(json.loads(args.child))) + "\n")
        return
    if not args.show:
        if args.folder is None:
            parser.error("name the folder with mbpp.jsonl and code_alpaca.json")
        args.output.write_text(json.dumps(measure(args), indent=2) + "\n")
    for table in tables(json.loads(args.output.read_text())).values():
        sys.stdout.write(table + "\n\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all sections and return the result."""
    console = Console(stderr=True)
    console.print("Preprocessing", highlight=False)
    result: dict[str, Any] = {"environment": environment(), "max_length": MAX_LENGTH, "batch_size": BATCH_SIZE}
    result["preprocessing"] = run_in_child({"names": NAMES, "folder": str(args.folder), "packing": True})
    result["scale"] = [measure_scale(rows, console) for rows in args.scales]
    result["throughput"] = measure_throughput(args.folder, args.rounds, console)
    return result


def run_in_child(settings: dict[str, Any]) -> dict[str, Any]:
    """Preprocess in a separate process with an empty cache, and return what it measured."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.data", "--child", json.dumps(settings)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_CACHE": cache},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def preprocess(settings: dict[str, Any]) -> dict[str, Any]:
    """Prepare data once without a cache and once from the cache, and return times and memory."""
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(MODEL)
    before = memory("VmRSS") - memory("RssFile")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        data = prepare(settings, tokenizer)
        seconds.append(time.perf_counter() - start)
    tokens = int(data.train.lengths.sum() + data.validation.lengths.sum())
    record = data.record()
    for summary in record["datasets"]:
        summary["source"] = Path(summary["source"]).name  # a path holds on one machine only
    return {
        **record,
        "examples": sum(summary.train + summary.validation for summary in data.summaries),
        "tokens": tokens,
        "seconds": seconds[0],
        "seconds_from_cache": seconds[1],
        "tokens_per_second": tokens / seconds[0],
        "memory_mib": (memory("VmRSS") - memory("RssFile") - before) / 1024,
        "peak_mib": memory("VmHWM") / 1024,
    }


def prepare(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Prepare data as ``train`` does."""
    return prepare_data(
        settings["names"],
        tokenizer,
        max_length=MAX_LENGTH,
        packing=settings["packing"],
        template=template_of("auto", tokenizer),
        data_dir=settings["folder"],
        workers=len(os.sched_getaffinity(0)),
    )


def memory(field: str) -> int:
    """Return a field of this process's status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def measure_scale(rows: int, console: Console) -> dict[str, Any]:
    """Measure memory and speed for this many synthetic rows of about 60 tokens."""
    console.print(f"{rows:,} rows", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made_up.jsonl"
        with path.open("w") as file:
            for number in range(rows):
                task = f"Add {number} to each of the numbers of a list, and keep those above {number * 7 % 1000}."
                code = f"def add(numbers):\n    return [n + {number} for n in numbers if n > {number * 7 % 1000}]\n"
                file.write(json.dumps({"instruction": task, "output": code}) + "\n")
        size = path.stat().st_size / 2**20
        found = run_in_child({"names": [f"made_up={path}"], "folder": None, "packing": True})
    kept = ("examples", "tokens", "seconds", "tokens_per_second", "memory_mib", "peak_mib", "packing_efficiency")
    return {"rows": rows, "file_mib": size, **{key: found[key] for key in kept}}


def measure_throughput(folder: Path, rounds: int, console: Console) -> dict[str, Any]:
    """Measure labelled tokens per second of each contender in each round, and the ratios of packed to padded."""
    tokenizer = load_tokenizer(MODEL)
    feeds = {name: endless_batches(name, folder, tokenizer) for name in BATCHES}
    learned: dict[str, list[int]] = {name: [] for name in BATCHES}
    step = train_step()

    def contender(name: str) -> Timed:
        def some_batches() -> None:
            batches = list(itertools.islice(feeds[name], BATCHES[name]))
            learned[name].append(sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches))
            for batch in batches:
                step(batch)

        return Timed(some_batches, rounds, warm_up=lambda: step(next(feeds[name])))

    entries = {name: contender(name) for name in BATCHES}
    seconds = interleaved(entries, progress=lambda text: console.print(text, highlight=False))
    speeds = {
        name: [count / time for count, time in zip(learned[name], seconds[name], strict=True)] for name in BATCHES
    }
    gains = {
        name: spread([packed / own for packed, own in zip(speeds["packed"], values, strict=True)])
        for name, values in speeds.items()
        if name != "packed"
    }
    return {"batches": BATCHES, "labelled_tokens_per_second": speeds, "packed_over": gains}


def endless_batches(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Yield batches of a contender without end."""
    packed = name == "packed"
    data = prepare({"names": NAMES, "folder": str(folder), "packing": packed}, tokenizer)
    sampler = MixingSampler(
        data.train.domains,
        batch_size=BATCH_SIZE,
        lengths=data.train.lengths if "similar" in name else None,
    )
    assert tokenizer.pad_token_id is not None
    collate = TokenCollator(tokenizer.pad_token_id)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = collate([data.train[row] for row in order[start : start + BATCH_SIZE]])
            del batch["domain"]
            yield pad_to_full_length(batch, tokenizer.pad_token_id) if "full length" in name else batch


def pad_to_full_length(batch: Batch, pad: int) -> Batch:
    """Return a batch padded to the full length, as many scripts do."""
    fills = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.nn.functional.pad(batch[name], (0, MAX_LENGTH - batch[name].shape[1]), value=fill)
        for name, fill in fills.items()
    }


def train_step() -> Any:
    """Return a function that runs one training step of the default mixture, with the optimizer."""
    set_seed(0)
    model = DyLoRA_MoE(load_base_model(MODEL)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)

    def step(batch: Batch) -> None:
        model(**batch, return_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
