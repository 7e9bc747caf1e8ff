"""Compare the speed of two versions of this package: the same workloads, in turns, and the operators that they run.

    git worktree add /tmp/before eda6999
    python -m benchmarks.versions --before /tmp/before    measure, write benchmarks/versions/versions.json, print
    python -m benchmarks.versions --show                  print the tables of the committed result

Each version runs in a process of its own, and each sitting starts new ones, since times vary from process to process.
In each round every workload runs once in each version, in random order; a ratio is seconds now over seconds before in
the same round. A change is slower if the whole range from the lower to the upper quartile is above 1. The counts of
tensor operators, with the shapes of their inputs, say whether the versions compute the same. On SmolLM2-135M-Instruct
in float32, with random tokens.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.common.timing import Timed, interleaved, ratios

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_name("versions.json")
Workload = tuple[str, str, int, int]
WORKLOADS: list[Workload] = [
    ("train", "per_layer", 8, 2),
    ("train", "final", 4, 2),
    ("train", "prefix", 4, 2),
    ("forward", "per_layer", 8, 2),
    ("forward", "prefix", 4, 2),
    ("generate", "per_layer", 4, 1),
    ("generate", "per_layer", 4, 8),
    ("generate", "prefix", 4, 1),
    ("generate", "final", 4, 1),
    ("generate", "context", 4, 1),
]
"""Work, routing mode, number of experts, and rows of the batch."""


class Version:
    """A process that runs the workloads of one source tree."""

    def __init__(self, tree: Path, length: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.versions.worker", str(torch.get_num_threads()), str(length)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tree / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of the worker and return what it returns."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the worker ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout of the earlier version")
    parser.add_argument("--sittings", type=int, default=4, help="pairs of processes, one after the other")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each sitting")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row of a train step or a forward")
    args = parse_flags(parser, RESULT)
    if not args.show:
        if args.before is None or not (args.before / "src" / "dylo_moe").is_dir():
            parser.error(f"--before must be a checkout of an earlier version, got {args.before}")
        args.output.write_text(json.dumps(measure(args), indent=1) + "\n")
    sys.stdout.write(table(json.loads(args.output.read_text())) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all workloads in both versions and return the result."""
    counts: dict[Workload, dict[str, dict[str, int]]] = {}
    seconds: dict[Workload, dict[str, list[float]]] = {workload: {"before": [], "now": []} for workload in WORKLOADS}
    with Console(stderr=True).status("") as status:

        def note(title: str, text: str) -> None:
            status.update(f"{title}, {text}")

        for sitting in range(args.sittings):
            versions = {"before": Version(args.before, args.length), "now": Version(ROOT, args.length)}
            for workload in WORKLOADS:
                title = f"sitting {sitting + 1} of {args.sittings}: {' '.join(map(str, workload))}"
                note(title, "operators")
                if workload not in counts:
                    counts[workload] = {key: one.ask("operators", *workload) for key, one in versions.items()}
                entries = {key: Timed(partial(one.ask, "run", *workload), args.rounds) for key, one in versions.items()}
                for key, found in interleaved(entries, progress=partial(note, title)).items():
                    seconds[workload][key] += found
            for version in versions.values():
                version.close()
    rows = [
        {
            "workload": workload,
            "seconds": seconds[workload],
            "ratio": ratios(seconds[workload], "before")["now"],
            **compare_counts(**counts[workload]),
        }
        for workload in WORKLOADS
    ]
    commits = {"before": commit_of(args.before), "now": commit_of(ROOT)}
    setting = {"length": args.length, "sittings": args.sittings}
    return {"environment": environment(), "commits": commits, **setting, "rows": rows}


def compare_counts(before: dict[str, int], now: dict[str, int]) -> dict[str, Any]:
    """Return the number of operators in each version, and those whose count differs."""
    names = sorted({*before, *now})
    differ = {name: [before.get(name, 0), now.get(name, 0)] for name in names if before.get(name) != now.get(name)}
    return {"operators": [sum(before.values()), sum(now.values())], "differ": differ}


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a result."""
    lines = [
        "| work, mode, experts, rows | seconds now / before | quartiles | operators before | now | of another kind |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        low, high = row["ratio"]["quartiles"]
        kinds = sorted({name.split()[0].removeprefix("aten::") for name in row["differ"]})
        operators_before, operators_now = row["operators"]
        lines.append(
            f"| {' '.join(map(str, row['workload']))} | {row['ratio']['median']:.3f} | {low:.3f} to {high:.3f} "
            f"| {operators_before:,} | {operators_now:,} | {', '.join(kinds) or 'none'} |"
        )
    rounds, where = result["rows"][0]["ratio"]["rounds"], result["environment"]
    before, now = (result["commits"][key][:7] for key in ("before", "now"))
    machine = f"{where['processor']}, {where['threads']} threads, torch {where['versions']['torch']}"
    sittings = result.get("sittings", 1)  # the first results had one, and did not say so
    in_sittings = f"{rounds} rounds in {sittings} sitting{'s' if sittings > 1 else ''}"
    return "\n".join([*lines, "", f"{in_sittings}, {before} and {now}; {machine}."])


if __name__ == "__main__":
    main()
