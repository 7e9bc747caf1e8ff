"""A shared expert with routed ones, and a mixture of adapters that were trained apart, beside plain LoRA.

A shared expert of rank 7 with nine routed ones of rank 1 stands beside PEFT's LoRA of rank 16 in the same layers. Nine
composed adapters of rank 8 on all linear modules of all layers stand beside PEFT with one of them.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.common.timing import Timed, ratios
from benchmarks.speed.contenders import (
    BASE,
    OURS_TRAIN,
    TARGETS,
    Contender,
    random_tokens,
    randomize,
    shared_copy,
    trainable_parameters,
)
from benchmarks.speed.sections import BATCH, Run
from benchmarks.speed.workloads import forward_call, generate_call, train_call
from dylo_moe.core import DyLoRA_MoE
from dylo_moe.skills import mixture_of

FIRST_LAYER, EXPERTS, SHARED_RANK, ADAPTER_RANK = 7, 9, 7, 8
LORA, SHARED, ADAPTER, COMPOSED = "lora", "shared", "adapter", "composed"
ROUNDS = 9


def mixtures(run: Run) -> dict[str, Any]:
    """Measure train step and generation of shared + routed, and forward and generation of composed adapters."""
    run.progress("building the mixtures")
    base = run.lineup.base
    models = {
        BASE: Contender(shared_copy(base)),
        LORA: plain_lora(shared_copy(base)),
        SHARED: shared_and_routed(shared_copy(base)),
        **composed_and_one(base),
    }
    tokens, prompt = random_tokens(base, BATCH, run.length), random_tokens(base, 1, run.length // 4)

    def timed(names: Mapping[str, Any]) -> dict[str, list[float]]:
        return run.timed({name: Timed(call, run.rounds(ROUNDS)) for name, call in names.items()})

    train = timed({name: train_call(models[name], tokens) for name in (LORA, SHARED)})
    forward = timed({name: forward_call(models[name], tokens) for name in (ADAPTER, COMPOSED)})
    generate = timed({name: generate_call(model, prompt, run.length // 4) for name, model in models.items()})
    return {
        "train": {"ratios": ratios(train, LORA), "seconds": train},
        "forward": {"ratios": ratios(forward, ADAPTER), "seconds": forward},
        # seconds turned round are speeds
        "generate": {
            "ratios": ratios({name: [1 / one for one in values] for name, values in generate.items()}, BASE),
            "to_adapter": ratios({name: [1 / one for one in values] for name, values in generate.items()}, ADAPTER),
            "seconds": generate,
        },
        "parameters": {name: sum(one.numel() for one in models[name].trainable) for name in (LORA, SHARED)},
    }


def plain_lora(base: PreTrainedModel) -> Contender:
    """Return PEFT's LoRA with the ranks of the mixture together, in the layers above the router."""
    rank = SHARED_RANK + EXPERTS
    layers = [*range(FIRST_LAYER, base.config.num_hidden_layers)]
    return _trained(
        get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=TARGETS, layers_to_transform=layers)
        )
    )


def shared_and_routed(base: PreTrainedModel) -> Contender:
    """Return a mixture with a shared expert, of whose routed ones each token gets one, in training too."""
    model = DyLoRA_MoE(
        base,
        EXPERTS,
        rank=1,
        shared_rank=SHARED_RANK,
        target_modules="attention",
        routing=f"context:{FIRST_LAYER}",
        top_k=1,
        expert_scale="unit",
        balance_coefficient=0.0,
    )
    model.router.sparse_training = True
    model.router.requires_grad_(False)  # solved, not trained
    model.set_maturity()
    return Contender(*_with_effect(model), OURS_TRAIN)


def composed_and_one(base: PreTrainedModel) -> dict[str, Contender]:
    """Return nine adapters in all layers as one mixture, and PEFT with one of them."""
    config = LoraConfig(task_type="CAUSAL_LM", r=ADAPTER_RANK, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        one = get_peft_model(shared_copy(base), config, adapter_name="expert_0")
        for index in range(1, EXPERTS):
            one.add_adapter(f"expert_{index}", config)
        randomize(one)
        one.save_pretrained(folder, save_embedding_layers=False)
        for index in range(1, EXPERTS):
            one.delete_adapter(f"expert_{index}")
        adapters = {f"expert_{index}": Path(folder) / f"expert_{index}" for index in range(EXPERTS)}
        composed = mixture_of(adapters, shared_copy(base))
    return {ADAPTER: Contender(one), COMPOSED: Contender(composed)}


def _trained(model: nn.Module) -> Contender:
    return Contender(*_with_effect(model))


def _with_effect(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    randomize(model)
    return model, trainable_parameters(model)
