"""Identifies the model in memory by a digest of all that its answers depend on."""

import hashlib
import json
from typing import cast

import torch
from peft import LoraConfig

from dylo_moe.core import DyLoRA_MoE, fingerprint
from dylo_moe.evaluation.generation import Model
from dylo_moe.evaluation.results import ModelRecord


def model_record(model: Model, name: str) -> ModelRecord:
    """Return the record of a model for a result.

    Args:
        model: A mixture or a plain causal LM.
        name: Where the model came from.
    """
    return ModelRecord(
        name=name,
        kind="mixture" if isinstance(model, DyLoRA_MoE) else "base",
        digest=model_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def model_digest(model: Model) -> str:
    """Return the SHA-256 of the base model's fingerprint and, for a mixture, of its experts, router and routing.

    It covers the parameters in memory and the current mode: a mixture that runs only its base, or only one expert, has
    another digest.
    """
    if not isinstance(model, DyLoRA_MoE):
        return hashlib.sha256(fingerprint(model).encode()).hexdigest()
    router = model.router
    adapters = cast(dict[str, LoraConfig], model.model.peft_config)
    description = {
        "base": fingerprint(model.experts.base_model),
        "base_only": model.experts.routing_state.scope.base_only,
        "active": model.experts.active,
        "scaling": [[name, one.r, one.lora_alpha, one.use_rslora] for name, one in adapters.items()],
        "routing": [model.routing, router.top_k, router.temperature, list(router.maturity)],
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    experts = {key: value for key, value in model.model.state_dict().items() if "lora_" in key}
    # expert_load is training state, which routing does not depend on
    gates = {key: value for key, value in router.state_dict().items() if key != "expert_load"}
    for key, tensor in sorted({**experts, **gates}.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
