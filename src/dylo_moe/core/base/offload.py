"""Weights that accelerate has offloaded to memory or to the disk until their module is called.

Calling a module brings its weights into place. This is for code that reads weights without calling their module.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.errors import ModelError


def in_place(module: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which the weights that a module itself holds are in place."""
    if "_hf_hook" in vars(module):
        aligned: AbstractContextManager[object] = align_module_device(module)
        return aligned
    return nullcontext()


def is_offloaded(model: nn.Module) -> bool:
    """Return whether any weight of a model is offloaded."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_offloaded(model: nn.Module, remedy: str) -> None:
    """Raise ``ModelError`` if a weight of a model is offloaded: a value written into it would be lost."""
    if is_offloaded(model):
        raise ModelError(f"the weights of {type(model).__name__} are offloaded: {remedy}")


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes, even while its weights are offloaded."""
    if model.device.type != "meta":
        return model.device
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), model.device))


def parameters_in_place(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a model as ``named_parameters`` does, each in place until the next is asked for."""
    if not is_offloaded(model):
        yield from model.named_parameters()
        return
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for prefix, module in model.named_modules():
        with in_place(module):
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                if name not in tied:  # tied parameters are separate objects while offloaded
                    yield name, parameter


def state_in_place(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of ``state_dict`` for experts and router, with copies of offloaded tensors."""
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name or name.startswith("router.")}
    offloaded = {name for name, value in state.items() if value.is_meta}
    return state | {name: value.detach().clone() for name, value in parameters_in_place(model) if name in offloaded}
