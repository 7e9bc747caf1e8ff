"""Which model is in memory: a digest of what its answers follow from."""

import hashlib
import json
from typing import cast

import torch
from peft import LoraConfig
from torch import Tensor

from dylo_moe.core.fingerprint import fingerprint
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.evaluation.generation import Model
from dylo_moe.evaluation.results import ModelRecord


def model_record(model: Model, name: str) -> ModelRecord:
    """What a result says of a model."""
    return ModelRecord(
        name=name,
        kind="mixture" if isinstance(model, DyLoRA_MoE) else "base",
        digest=model_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def model_digest(model: Model) -> str:
    """SHA-256 over the base model's fingerprint, and for a mixture over all experts, the router and the routing.

    It is of the parameters that are in memory and of what is switched on now: a mixture that runs its base alone, or
    one expert, has another digest.
    """
    if not isinstance(model, DyLoRA_MoE):
        return hashlib.sha256(fingerprint(model).encode()).hexdigest()
    router = model.router
    adapters = cast(dict[str, LoraConfig], model.model.peft_config)
    described = {
        "base": fingerprint(model.experts.base_model),
        "base_only": model.experts.routing_state.scope.base_only,
        "active": model.experts.active,
        "scaling": [[name, one.r, one.lora_alpha, one.use_rslora] for name, one in adapters.items()],
        "routing": [model.routing, router.top_k, router.temperature, list(router.maturity)],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    experts = {key: value for key, value in model.model.state_dict().items() if "lora_" in key}
    # what a training run goes on with, and routing does not depend on
    gates = {key: value for key, value in router.state_dict().items() if key != "expert_load"}
    for key, tensor in sorted({**experts, **gates}.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
