"""Profiles of PEFT's plain LoRA and ours: operators by their self time, and the cost of a decoded token.

    python -m benchmarks.speed.profile          measure, write benchmarks/speed/profile.json, print the tables
    python -m benchmarks.speed.profile --show   print the tables of the committed result

The profiler itself costs time, most of all for small operators. So this shows where the time goes;
``benchmarks.speed`` measures how much there is.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from benchmarks.common.result_file import environment, parse_flags
from benchmarks.speed.contenders import BASE, REFERENCE, Lineup, label, random_tokens
from benchmarks.speed.workloads import forward_call, generate_call, train_call
from dylo_moe.core.base.loading import load_base_model

RESULT = Path(__file__).with_name("profile.json")
OURS = ("ours_prefix_4", "ours_per_layer_4")
MANY = "ours_per_layer_64"
WORKLOADS: dict[str, tuple[Callable[..., Callable[[], Any]], tuple[str, ...]]] = {
    "forward": (forward_call, (REFERENCE, *OURS, MANY)),
    "train": (train_call, (REFERENCE, *OURS)),
}
CALLS, PROMPT, NEW_TOKENS, ROUNDS = 3, 64, 32, 3
SHOWN = 14

Profile = dict[str, list[float]]


def main() -> None:
    """Read the flags, measure, write the result and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_flags(parser, RESULT)
    if not args.show:
        args.output.write_text(json.dumps(measure(), indent=1) + "\n")
    sys.stdout.write(tables(json.loads(args.output.read_text())) + "\n")


def measure() -> dict[str, Any]:
    """Profile every workload and contender and return the result."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
    lineup = Lineup(load_base_model("demo"))
    tokens = random_tokens(lineup.base, 2, 256)
    result: dict[str, Any] = {"environment": environment(), "operators": {}, "decoding": {}}
    for what, (make, names) in WORKLOADS.items():
        calls = {name: make(lineup.get(name), tokens) for name in names}
        result["operators"][what] = {name: operators(call, CALLS) for name, call in calls.items()}
    prompt = random_tokens(lineup.base, 1, PROMPT)
    for name in (BASE, REFERENCE, *OURS):
        contender = lineup.get(name)
        assert contender is not None
        if name in OURS:
            contender.model.router.top_k = 1
        result["decoding"][name] = decoding(contender, prompt)
    return result


def operators(call: Callable[[], Any], calls: int) -> Profile:
    """Return the milliseconds of self time and the number of runs in one call, by operator and shapes."""
    call()
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(calls):
            call()
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in found.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
            entry = sums[f"{event.key.removeprefix('aten::')} {shapes}".strip()]
            entry[0] += event.self_cpu_time_total / 1000 / calls
            entry[1] += event.count / calls
    return {key: [round(ms, 3), round(count, 1)] for key, (ms, count) in sums.items() if ms >= 0.01}


def decoding(contender: Any, prompt: Any) -> dict[str, float]:
    """Return the milliseconds and operators of one more token, by the difference of two generations."""
    short, long = (generate_call(contender, prompt, count) for count in (2, 2 + NEW_TOKENS))
    short()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        short()
        middle = time.perf_counter()
        long()
        seconds.append(time.perf_counter() - middle - (middle - start))
    counts = []
    for call in (short, long):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            call()
        counts.append(sum(event.count for event in found.key_averages() if event.key.startswith("aten::")))
    return {
        "ms_per_token": round(statistics.median(seconds) * 1000 / NEW_TOKENS, 2),
        "operators_per_token": round((counts[1] - counts[0]) / NEW_TOKENS, 1),
    }


def tables(result: dict[str, Any]) -> str:
    """Return the tables of the operators whose time differs most from LoRA's, and of a decoded token's cost."""
    parts = []
    for what, profiles in result["operators"].items():
        parts += [_operator_table(what, profiles), ""]
    rows = ["| decoding, batch 1 | ms per token | operators per token |", "| --- | --- | --- |"]
    for name, cost in result["decoding"].items():
        rows.append(f"| {label(name)} | {cost['ms_per_token']:.1f} | {cost['operators_per_token']:,.0f} |")
    machine = result["environment"]
    rows += ["", f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}."]
    return "\n".join([*parts, *rows])


def _operator_table(what: str, profiles: dict[str, Profile]) -> str:
    def ms(name: str, operator: str) -> float:
        return profiles[name].get(operator, [0.0, 0.0])[0]

    known = {operator for found in profiles.values() for operator in found}
    names = list(profiles)
    apart = sorted(known, key=lambda operator: -abs(ms(names[-1], operator) - ms(REFERENCE, operator)))[:SHOWN]
    head = [f"{what}: self time in ms", *map(label, names)]
    rows = [head, ["---"] * len(head)]
    rows += [[f"`{operator}`", *(f"{ms(name, operator):.1f}" for name in names)] for operator in apart]
    rows.append(["all operators", *(f"{sum(found[0] for found in profiles[name].values()):.0f}" for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
