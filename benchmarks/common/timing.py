"""Interleaved timing: each round times every contender once, and only times of the same round are compared.

A machine that others use, or that slows down when it gets warm, changes its speed over minutes, and so over a
benchmark. Within one round it changes little, so the ratio to the reference in the same round is more stable than any
absolute time.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]


@dataclass
class Timed:
    """A call to time.

    Attributes:
        call: The timed call.
        rounds: Number of rounds in which it runs, from the first on.
        warm_up: Call that runs once before, untimed; ``call`` itself by default.
    """

    call: Call
    rounds: int
    warm_up: Call | None = None


def interleaved(entries: Mapping[str, Timed], *, progress: Callable[[str], object]) -> dict[str, list[float]]:
    """Time each entry once per round, in random order, and return its seconds in each of its rounds.

    Args:
        entries: The calls by name.
        progress: Function that receives the name of what runs.
    """
    for name, entry in entries.items():
        progress(f"{name}: warm-up")
        (entry.warm_up or entry.call)()
    # garbage collection over hundreds of thousands of module objects would disturb the times
    gc.collect()
    gc.freeze()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    rounds = max((entry.rounds for entry in entries.values()), default=0)
    for index in range(rounds):
        names = [name for name, entry in entries.items() if entry.rounds > index]
        order.shuffle(names)
        for name in names:
            progress(f"{name}: round {index + 1} of {rounds}")
            start = time.perf_counter()
            entries[name].call()
            seconds[name].append(round(time.perf_counter() - start, 5))
    gc.unfreeze()
    return seconds


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Return median and quartiles of each entry's seconds divided by the reference's in the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        same_rounds = [own / other for own, other in zip(values, seconds[reference], strict=False)]
        found[name] = spread(same_rounds)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Return median and quartiles, with the number of values."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    low, median, high = (round(cut, 4) for cut in cuts)
    return {"median": median, "quartiles": [low, high], "rounds": len(values)}
