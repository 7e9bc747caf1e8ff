"""Tables of the study of one training run."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

Runs = Mapping[str, Any]
REFERENCE = "lora"
BOOTSTRAP = 2000


def losses_of(run: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the loss of each domain, in nats per answer token: ``(domains,)``."""
    return np.array([sum(row[0] for row in rows) / sum(row[1] for row in rows) for rows in run["tasks"].values()])


def difference(arm: list[Any], reference: list[Any], same_tasks: bool, seed: int = 0) -> tuple[float, float, float]:
    """Return how far an arm's mean loss is from the reference's, as a fraction, and its 95 % interval.

    Runs are paired by seed. Held-out rows are drawn with replacement, the same for both; ``same_tasks`` draws the same
    rows in all domains, because they are the same tasks in several languages.
    """
    random = np.random.default_rng(seed)
    names = list(reference[0]["tasks"])
    sizes = [len(reference[0]["tasks"][name]) for name in names]
    arms, references = (
        [[np.array([row[:2] for row in run["tasks"][name]]) for name in names] for run in runs]
        for runs in (arm, reference)
    )

    def one(chosen: list[NDArray[np.int64]]) -> float:
        return float(
            mean(
                mean(_loss(own[rows]) for own, rows in zip(a, chosen, strict=True))
                / mean(_loss(other[rows]) for other, rows in zip(b, chosen, strict=True))
                - 1
                for a, b in zip(arms, references, strict=True)
            )
        )

    drawn = []
    for _ in range(BOOTSTRAP):
        shared = random.random(max(sizes))
        drawn.append(
            one(
                [
                    ((shared if same_tasks else random.random(max(sizes)))[:size] * size).astype(np.int64)
                    for size in sizes
                ]
            )
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return one([np.arange(size) for size in sizes]), float(low), float(high)


def _loss(rows: NDArray[np.float64]) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table for each data set."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for key, run in result["runs"].items():
        name, seed, arm = key.split("/", 2)
        if seed.isdigit():
            found.setdefault(name, {}).setdefault(arm, {})[int(seed)] = run
    return "\n\n".join(_table(name, arms) for name, arms in found.items())


def _table(name: str, arms: dict[str, dict[int, Any]]) -> str:
    lines = [
        f"{name}:",
        "",
        "| arm | parameters | rate | seeds | held-out loss | against LoRA | 95 % interval | routed right |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, seeds in sorted(arms.items(), key=lambda item: mean(float(losses_of(r).mean()) for r in item[1].values())):
        runs = list(seeds.values())
        means = [float(losses_of(run).mean()) for run in runs]
        against = interval = ""
        common = sorted(set(seeds) & set(arms.get(REFERENCE, {})))
        if common and arm != REFERENCE:
            middle, low, high = difference(
                [seeds[seed] for seed in common], [arms[REFERENCE][seed] for seed in common], name == "mbxp"
            )
            against, interval = f"{middle:+.2%}", f"{low:+.2%} to {high:+.2%}"
        right = _routed_right(runs) if "routed" in arm else ""
        parameters = f"{runs[0]['parameters']:,}"
        loss = f"{mean(means):.4f} ({min(means):.4f} to {max(means):.4f})"
        rate = f"{runs[0]['rate']:g}"
        lines.append(f"| {arm} | {parameters} | {rate} | {len(runs)} | {loss} | {against} | {interval} | {right} |")
    return "\n".join(lines)


def _routed_right(runs: list[Any]) -> str:
    rows = [row for run in runs for domain in run["tasks"].values() for row in domain]
    if len(rows[0]) < 4:
        return ""
    return f"{sum(row[3] for row in rows) / sum(row[1] for row in rows):.1%}"
