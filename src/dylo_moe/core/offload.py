"""Weights that lie elsewhere until their module is called: accelerate's offloading to memory or to the disk.

Most of a model calls the modules that hold its weights, and gets them in place by that. This is for the rest.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.errors import ModelError


def in_place(module: nn.Module) -> AbstractContextManager[Any]:
    """Bring the weights that a module itself holds into place, for a block of code."""
    if "_hf_hook" in vars(module):
        return align_module_device(module)  # type: ignore[no-any-return]
    return nullcontext()


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether a weight of a model lies elsewhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_offloaded(model: nn.Module, remedy: str) -> None:
    """Raise ``ModelError`` where a weight of a model lies elsewhere: what is written into it would be lost."""
    if is_offloaded(model):
        raise ModelError(f"the weights of {type(model).__name__} are offloaded: {remedy}")


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes, wherever its weights lie meanwhile."""
    if model.device.type != "meta":
        return model.device
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), model.device))


def parameters_in_place(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a model as ``named_parameters`` does, each in place until the next one."""
    if not is_offloaded(model):
        yield from model.named_parameters()
        return
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for prefix, module in model.named_modules():
        with in_place(module):
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                if name not in tied:  # they are two objects while they are in two places
                    yield name, parameter


def state_in_place(model: nn.Module) -> dict[str, Tensor]:
    """Return what ``state_dict`` has of experts and router, with copies of what is not in place."""
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name or name.startswith("router.")}
    away = {name for name, value in state.items() if value.is_meta}
    return state | {name: value.detach().clone() for name, value in parameters_in_place(model) if name in away}
