"""Peak memory, measured in a separate process that ``benchmarks.speed`` starts; prints one line of JSON.

    python -m benchmarks.speed.memory train ours_prefix_4 256    two train steps of 2 x 256 tokens
    python -m benchmarks.speed.memory loss chunked 256000        cross-entropy over a large vocabulary

The peak is the kernel's high-water mark of resident memory, which is reset once everything is built, minus the memory
that was resident then. Linux only.
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.contenders import Lineup, random_tokens
from benchmarks.speed.workloads import train_call
from dylo_moe.core.base.loading import load_base_model
from dylo_moe.core.losses import linear_causal_lm_loss

LOSS_BATCH, LOSS_LENGTH, LOSS_HIDDEN = 2, 2048, 2048
"""Shape of CodeGemma-2B's hidden states for two rows of 2048 tokens."""


def main() -> None:
    """Measure what the arguments name and print the result."""
    what, name = sys.argv[1], sys.argv[2]
    size = int(sys.argv[3])
    result = train_memory(name, size) if what == "train" else loss_memory(name, size)
    sys.stdout.write(json.dumps(result) + "\n")


def train_memory(name: str, length: int) -> dict[str, float]:
    """Measure two train steps, the second of which has the optimizer's state from the first."""
    base = load_base_model("demo")
    contender = Lineup(base).get(name)
    assert contender is not None, name
    step = train_call(contender, random_tokens(base, 2, length))

    def two_steps() -> None:
        step()
        step()

    return run_measured(two_steps)


def loss_memory(name: str, vocabulary: int) -> dict[str, float]:
    """Measure the cross-entropy of hidden states under a frozen head, with the gradient of the hidden states."""
    torch.manual_seed(0)
    hidden = torch.randn(LOSS_BATCH, LOSS_LENGTH, LOSS_HIDDEN, requires_grad=True)
    head = torch.randn(vocabulary, LOSS_HIDDEN).mul_(0.02)
    labels = torch.randint(vocabulary, (LOSS_BATCH, LOSS_LENGTH))
    return run_measured(lambda: LOSSES[name](hidden, head, labels).backward())


def plain_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as transformers' causal LMs do: all logits in float32 at once, and shifted labels."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), shifted.flatten())


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain_loss,
    "chunked": linear_causal_lm_loss,
}


def run_measured(action: Callable[[], Any]) -> dict[str, float]:
    """Run an action; return its peak resident MiB minus what was resident before, and its seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return {"before_mib": before, "peak_mib": _status("VmHWM") - before, "seconds": seconds}


def _status(key: str) -> float:
    """Return a field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the system's process status has no {key}")


if __name__ == "__main__":
    main()
