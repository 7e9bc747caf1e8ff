"""Speed and memory of the routed mixture, compared with plain LoRA and other methods with several LoRA experts.

    python -m benchmarks.speed             measure, write benchmarks/speed/speed.json and .png, print the tables
    python -m benchmarks.speed --show      print the tables of the committed result
    python -m benchmarks.speed --sections train --rounds-scale 0.1 --length 32 --output /tmp/speed.json    try it

In float32 on the CPU, on SmolLM2-135M-Instruct with random tokens. Times are compared only within rounds in which every
contender runs once (see ``timing``). Not covered: GPUs, other precisions, quality, and CodeGemma-2B as a whole.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.speed import sections
from benchmarks.speed.codegemma import codegemma
from benchmarks.speed.contenders import Lineup
from benchmarks.speed.figure import write_figure
from benchmarks.speed.mixtures import mixtures
from benchmarks.speed.table import tables
from dylo_moe.core.base.loading import load_base_model

RESULT = Path(__file__).with_name("speed.json")
LENGTH, VOCABULARY = 256, 256_000
# memory sections first, before this process holds two dozen models
SECTIONS: dict[str, Callable[[sections.Run], dict[str, Any]]] = {
    "loss": sections.loss,
    "memory": sections.memory,
    "train": sections.train,
    "forward": sections.forward,
    "experts": sections.experts,
    "generate": sections.generate,
    "mixtures": mixtures,
    "codegemma": codegemma,
}


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    args = _arguments()
    if not args.show:
        measure(args)
    sys.stdout.write(tables(json.loads(args.output.read_text())) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--rounds-scale", type=float, default=1.0, help="multiplies the numbers of rounds")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="words of the large-vocabulary sections")
    args = parse_flags(parser, RESULT)
    smaller = (args.rounds_scale, args.length, args.vocabulary) != (1.0, LENGTH, VOCABULARY)
    if smaller and not args.show and args.output.resolve() == RESULT.resolve():
        parser.error("the committed result is measured in full; for a smaller run give another --output")
    return args


def measure(args: argparse.Namespace) -> None:
    """Run the sections, and write the result after each, so that an aborted run keeps its sections."""
    # warnings of other libraries about their models do not concern this benchmark
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|mixlora)\b")
    result = _beginning(args)
    console = Console(stderr=True)
    with console.status("loading the base model") as status:
        run = sections.Run(
            Lineup(load_base_model("demo")), args.length, args.rounds_scale, args.vocabulary, status.update
        )
        for name in [name for name in SECTIONS if name in args.sections]:
            start = time.perf_counter()
            result["sections"][name] = SECTIONS[name](run)
            minutes = (time.perf_counter() - start) / 60
            result["minutes"][name] = round(minutes, 2)
            result["not_run"] |= run.lineup.not_run
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            console.print(f"{name}: {minutes:.1f} minutes")
    write_figure(result, args.output.with_suffix(".png"))


def _beginning(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result before the run: empty, or with the same machine's sections that this run leaves out."""
    setup = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "batch": sections.BATCH,
        "length": args.length,
        "rank": 16,
        "rounds_scale": args.rounds_scale,
        "vocabulary": args.vocabulary,
    }
    result = {"environment": environment(), "setup": setup, "minutes": {}, "not_run": {}, "sections": {}}
    if args.output.exists() and set(args.sections) < set(SECTIONS):
        previous: dict[str, Any] = json.loads(args.output.read_text())
        if all(previous[key] == result[key] for key in ("environment", "setup")):
            return previous
    return result


if __name__ == "__main__":
    main()
