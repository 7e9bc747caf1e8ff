"""The sections of the speed benchmark; each returns its measurements as plain data for the result file.

Contenders with a target are timed in many rounds. Contenders that are several times slower, where a few percent do not
matter, are timed two or three times.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.timing import Timed, interleaved, ratios, spread
from benchmarks.speed.contenders import BASE, REFERENCE, Contender, Lineup, random_tokens
from benchmarks.speed.workloads import Call, forward_call, generate_call, train_call

BATCH = 2
OURS = ("ours_prefix_4", "ours_per_layer_4", "ours_final_4")
PEFT = ("peft_4", "peft_8", "peft_16")
XLORA, MIXLORA = ("xlora_4", "xlora_8"), ("mixlora_4", "mixlora_8")

FORWARD_ROUNDS = {
    **dict.fromkeys([BASE, REFERENCE, *OURS], 9),
    **dict.fromkeys(["lora_r64", "ours_prefix_8", "ours_per_layer_8", "ours_per_layer_16"], 4),
    **dict.fromkeys([*PEFT, "arrow_4", *XLORA, *MIXLORA, "naive_4"], 2),
}
TRAIN_ROUNDS = {
    **dict.fromkeys([REFERENCE, *OURS, "ours_per_layer_16"], 5),
    **dict.fromkeys([BASE, "lora_r64", "ours_per_layer_1", "ours_prefix_8", "ours_per_layer_8"], 3),
    **dict.fromkeys([PEFT[0], XLORA[0], MIXLORA[0]], 2),
    **dict.fromkeys([*PEFT[1:], XLORA[1], MIXLORA[1], "naive_4"], 1),
}
GROWTH, GROWTH_MODES, GROWTH_ROUNDS = (1, 4, 16, 64, 256), ("per_layer", "prefix"), 4
GENERATE_ROUNDS = {
    1: dict.fromkeys([BASE, *OURS[:2]], 3)
    | dict.fromkeys([REFERENCE, "peft_4", "arrow_4", "mixlora_4", "xlora_4", OURS[2]], 1),
    8: dict.fromkeys([BASE, *OURS[:2]], 3) | dict.fromkeys([REFERENCE, "peft_4", OURS[2]], 1),
    32: dict.fromkeys([BASE, REFERENCE, *OURS[:2]], 1),
}
MEMORY = (REFERENCE, *PEFT, "xlora_4", *OURS, "ours_per_layer_16")

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """Settings that the sections share.

    Attributes:
        lineup: The contenders.
        length: Tokens in a row; a generation uses a quarter of it for its prompt and a quarter for new tokens.
        scale: Factor on the numbers of rounds.
        vocabulary: Words of the large-vocabulary sections.
        progress: Function that receives the name of what runs.
    """

    lineup: Lineup
    length: int
    scale: float
    vocabulary: int
    progress: Callable[[str], object]

    def rounds(self, count: int) -> int:
        """Return a number of rounds, scaled; at least one."""
        return max(1, round(count * self.scale))

    def timed(self, entries: Mapping[str, Timed]) -> dict[str, list[float]]:
        """Time the entries interleaved and return their seconds."""
        return interleaved(entries, progress=self.progress)

    def contenders(self, rounds: Mapping[str, int]) -> dict[str, tuple[Contender, int]]:
        """Return the named contenders whose library is installed, with their scaled rounds."""
        found: dict[str, tuple[Contender, int]] = {}
        for name, count in rounds.items():
            self.progress(f"{name}: building")
            contender = self.lineup.get(name)
            if contender is not None:
                found[name] = contender, self.rounds(count)
        return found


def forward(run: Run) -> dict[str, Any]:
    """Measure the evaluation forward of every method; ours sparse with two experts per token."""
    return _compare(run, FORWARD_ROUNDS, forward_call)


def train(run: Run) -> dict[str, Any]:
    """Measure a train step of every method that trains; ours dense."""
    return _compare(run, TRAIN_ROUNDS, train_call)


def _compare(run: Run, rounds: Mapping[str, int], make: Callable[..., Call]) -> dict[str, Any]:
    tokens = random_tokens(run.lineup.base, BATCH, run.length)
    entries = {}
    for name, (contender, count) in run.contenders(rounds).items():
        call = make(contender, tokens)
        # slow contenders warm up on a few tokens, as a whole call takes as long as a round
        entries[name] = Timed(call, count, call if rounds[name] > 2 else make(contender, tokens[:, :16]))
    seconds = run.timed(entries)
    return {"reference": REFERENCE, "ratios": ratios(seconds, REFERENCE), "seconds": seconds}


def experts(run: Run) -> dict[str, Any]:
    """Measure the evaluation forward, top 2, for growing numbers of experts; the models are freed afterwards."""
    rounds = {f"ours_{mode}_{count}": GROWTH_ROUNDS for mode in GROWTH_MODES for count in GROWTH}
    lineup = Lineup(run.lineup.base)
    tokens = random_tokens(lineup.base, BATCH, run.length)
    own = replace(run, lineup=lineup)
    seconds = own.timed(
        {name: Timed(forward_call(one, tokens), n) for name, (one, n) in own.contenders(rounds).items()}
    )
    found: dict[str, Any] = {"reference": "4 experts of the same mode", "ratios": {}, "seconds": seconds}
    for mode in GROWTH_MODES:
        same_mode = {name: values for name, values in seconds.items() if name.startswith(f"ours_{mode}_")}
        found["ratios"] |= ratios(same_mode, f"ours_{mode}_4")
    return found


def generate(run: Run) -> dict[str, Any]:
    """Measure greedy generation, ours with one expert per token: speeds, and ratios to the base in the same round."""
    found: dict[str, Any] = {"reference": BASE, "prompt": run.length // 4, "batches": {}, "new_tokens": {}}
    for batch, rounds in GENERATE_ROUNDS.items():
        prompt = random_tokens(run.lineup.base, batch, run.length // 4)
        entries = {}
        for name, (contender, count) in run.contenders(rounds).items():
            if name.startswith("ours_"):
                contender.model.router.top_k = 1
            new_tokens = _new_tokens(name, run.length)
            found["new_tokens"][name] = new_tokens
            warm_up = generate_call(contender, prompt, 2)
            entries[name] = Timed(generate_call(contender, prompt, new_tokens), count, warm_up)
        found["batches"][str(batch)] = _speeds(run.timed(entries), batch, found["new_tokens"])
    return found


def _new_tokens(name: str, length: int) -> int:
    """Return the number of new tokens: few for X-LoRA, which has no cache, and which fewer tokens favor."""
    return length // 16 if name.startswith("xlora") else length // 4


def _speeds(seconds: dict[str, list[float]], batch: int, new_tokens: dict[str, int]) -> dict[str, Any]:
    speeds = {name: [batch * new_tokens[name] / value for value in values] for name, values in seconds.items()}
    tokens = {name: spread(values) for name, values in speeds.items()}
    return {"ratios": ratios(speeds, BASE), "tokens_per_second": tokens, "seconds": seconds}


def memory(run: Run) -> dict[str, Any]:
    """Measure the peak memory of a train step, each contender in its own process, two at a time on one thread each."""

    def measure(name: str) -> dict[str, float]:
        run.progress(f"{name}: memory of a train step")
        return _child("train", name, str(run.length), threads=1)

    with ThreadPoolExecutor(2) as pool:
        measured = dict(zip(MEMORY, pool.map(measure, MEMORY), strict=True))
    peaks = {name: result["peak_mib"] for name, result in measured.items()}
    relative = {name: peak / peaks[REFERENCE] for name, peak in peaks.items()}
    return {"reference": REFERENCE, "peak_mib": peaks, "ratios": relative}


def loss(run: Run) -> dict[str, Any]:
    """Measure peak memory and seconds of the cross-entropy over a large vocabulary, plain and chunked."""
    measured = {}
    for name in ("plain", "chunked"):
        run.progress(f"{name} cross-entropy over {run.vocabulary:,} words")
        measured[name] = _child("loss", name, str(run.vocabulary))
    plain, chunked = measured["plain"], measured["chunked"]
    relative = {key: chunked[key] / plain[key] for key in ("peak_mib", "seconds")}
    return {"vocabulary": run.vocabulary, "measured": measured, "ratios": relative}


def _child(*arguments: str, threads: int | None = None) -> dict[str, float]:
    """Run ``memory.py`` and return the result that it prints."""
    # freed blocks return to the system at once, so that the peak counts memory in use
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    if threads is not None:
        settings["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "benchmarks.speed.memory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{' '.join(arguments)} failed: {reason}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured
