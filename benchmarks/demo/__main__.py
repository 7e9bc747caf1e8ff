"""Held-out loss per domain of the base and of the mixture that ``make demo`` trains, over several seeds.

    python -m benchmarks.demo --seeds 0 1 2     train, write benchmarks/demo/demo.json, print the table
    python -m benchmarks.demo --show            print the table of the committed result

Each seed runs in a separate process, as a user's run does. The data splits are the same for all seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.result_file import environment

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_name("demo.json")
RECIPE = "recipes/demo.yaml"


def main() -> None:
    """Read the flags, run the seeds, write the result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="only print the committed result")
    args = parser.parse_args()
    if not args.show:
        runs: list[dict[str, Any]] = []
        for seed in args.seeds:
            runs.append(train(seed))
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(
                json.dumps({"recipe": RECIPE, "environment": environment(), "runs": runs}, indent=2) + "\n"
            )
    sys.stdout.write(table(json.loads(RESULT.read_text())) + "\n")


def train(seed: int) -> dict[str, Any]:
    """Run the recipe once and return its report, without the path that holds on this machine only."""
    with tempfile.TemporaryDirectory() as output:
        arguments = ["train", "--config", RECIPE, "--seed", str(seed), "--output_dir", output]
        subprocess.run([sys.executable, "-m", "dylo_moe", *arguments], cwd=ROOT, check=True)
        report: dict[str, Any] = json.loads((Path(output) / "report.json").read_text())
    del report["checkpoint"]
    return report


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table that the README shows."""
    runs = result["runs"]
    rows = ["| domain | base | mixture | change |", "| --- | --- | --- | --- |"]
    for domain in runs[0]["domains"]:
        base = [run["base"][f"loss/{domain}"] for run in runs]
        mixture = [run["mixture"][f"loss/{domain}"] for run in runs]
        change = [after / before - 1 for before, after in zip(base, mixture, strict=True)]
        rows.append(f"| `{domain}` | {_spread(base, '.3f')} | {_spread(mixture, '.3f')} | {_spread(change, '.1%')} |")
    share = runs[0]["trainable_parameters"] / runs[0]["base_parameters"]
    tokens = statistics.mean(run["train_tokens"] for run in runs)
    versions = runs[0]["versions"]
    rows.append("")
    rows.append(
        f"Loss in nats per token on {runs[0]['held_out_rows']} held-out rows, mean of {len(runs)} seeds ± standard "
        f"deviation; {runs[0]['trainable_parameters']:,} trainable parameters ({share:.2%} of the base), "
        f"{tokens:,.0f} training tokens, routing `{runs[0]['routing']}`; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}."
    )
    return "\n".join(rows)


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(deviation, form)}"


if __name__ == "__main__":
    main()
