"""What one model of many adapters costs: time to generate, beside the base in the same rounds, and memory."""

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Timed, interleaved, ratios
from benchmarks.mixture.answers import split
from benchmarks.mixture.arms import ARMS, Arm, Setting, lora_arm, merge_arm, xlora_arm
from benchmarks.mixture.setting import Batch
from benchmarks.mixture.study import Study

ROUNDS, NEW_TOKENS = 7, 32
TIMED = ("base", "compose", "by request", "uniform mean", "arrow")


def costs(study: Study, setting: Setting) -> dict[str, Any]:
    """Return seconds to make each model, and to generate with it as ratios to the base; and megabytes of parameters."""
    arms = {name: ARMS[name](setting) for name in TIMED}
    arms["one adapter"] = lora_arm(next(iter(setting.adapters.values())))
    arms["cat"] = merge_arm(setting, "cat", 1.0, None)
    arms["linear"] = merge_arm(setting, "linear", 1.0, None)
    arms["x-lora"] = xlora_arm(setting, rate=0.0)
    base = _megabytes(arms["base"].model)
    prompts, _ = split(study.batches(study.tasks[1], dev=False)[0], study.tokenizer.pad_token_id)
    seconds = interleaved(
        {name: Timed(lambda arm=arm: _generate(arm, prompts), ROUNDS) for name, arm in arms.items()},
        progress=lambda text: sys.stderr.write(f"{text}\n"),
    )
    found = ratios(seconds, "base")
    return {
        name: {"generation": found[name], "megabytes": round(_megabytes(arm.model) - base, 1), "seconds": arm.seconds}
        for name, arm in arms.items()
    }


@torch.no_grad()
def _generate(arm: Arm, prompts: Batch) -> Tensor:
    extra = arm.extra(prompts, 0)
    ids: Tensor = arm.model.generate(
        **prompts, **extra, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return ids


def _megabytes(model: torch.nn.Module) -> float:
    """Return the memory of all parameters, each counted once."""
    return sum(one.numel() * one.element_size() for one in model.parameters()) / 2**20
