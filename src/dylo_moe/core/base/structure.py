"""The backbone and the decoder layers of a causal language model, found by running it on two tokens.

Model families differ in the names of their modules and in which of them ``forward`` calls: OPT's head, for one, calls
``model.decoder`` and never ``model``. A hook only works on a module that is called.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.core.base.offload import device_of
from dylo_moe.errors import ModelError, first_line


class Decoder(NamedTuple):
    """The parts of a causal language model that routing uses.

    Attributes:
        backbone: Module that the model calls below its head; its first output is the last hidden states.
        layers: Decoder layers, in the order in which the backbone calls them.
        layer_width: Width of the hidden states that enter the layers.
        output_width: Width of the last hidden states, which some families project.
    """

    backbone: nn.Module
    layers: nn.ModuleList
    layer_width: int
    output_width: int


@dataclass
class _Call:
    module: nn.Module
    first_argument: Any
    output: Any = None


def find_decoder(causal_lm: PreTrainedModel) -> Decoder:
    """Find the backbone and the decoder layers of a model by running it on two tokens.

    Raises:
        ModelError: The model cannot be run on tokens alone, or does not call a list of layers one after the other.
    """
    calls = _record_calls(causal_lm)
    called = [call.module for call in calls]
    hidden = {
        id(call.module)
        for call in calls
        if isinstance(first := call.first_argument, Tensor) and first.is_floating_point() and first.shape[:-1] == (1, 2)
    }
    for layers in causal_lm.modules():
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not {*map(id, layers)} <= hidden:
            continue
        # routing ``final`` runs a mixture's layers twice
        if [id(module) for module in called if module in list(layers)][: len(layers)] != [*map(id, layers)]:
            continue
        for module in called:
            if module is not causal_lm and any(inner is layers for inner in module.modules()):
                width = next(call.first_argument.shape[-1] for call in calls if call.module is layers[0])
                output = next(call.output for call in calls if call.module is module)
                return Decoder(module, layers, width, output[0].shape[-1])
        raise ModelError(f"{type(causal_lm).__name__} has no backbone apart from its head; is it a causal LM?")
    raise ModelError(
        f"{type(causal_lm).__name__} does not call a list of decoder layers one after the other; experts need a "
        "decoder-only causal LM"
    )


def decoder_layers(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers; see ``find_decoder``."""
    return find_decoder(causal_lm).layers


def backbone(causal_lm: PreTrainedModel) -> nn.Module:
    """Return the model without its language-modelling head; see ``find_decoder``."""
    return find_decoder(causal_lm).backbone


def named_arguments(
    names: tuple[str, ...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return all arguments of a call by name, positional ones too."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def hidden_states_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """Return the hidden states among the arguments of a decoder layer, ``(batch, seq, hidden_size)``."""
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor)
    return first


def is_wrapped(module: nn.Module) -> bool:
    """Return whether hooks or a wrapped forward do more than the module's class does.

    Its weight can then not be read directly: offloading, for one, puts it in place only while the module runs.
    """
    own = module.__dict__
    return bool("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a block of code, then each module back into its own mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _record_calls(causal_lm: PreTrainedModel) -> list[_Call]:
    """Return the module calls of a forward of two tokens, in order."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append(_Call(module, args[0] if args else next(iter(kwargs.values()), None)))

    def note_output(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        next(call for call in reversed(calls) if call.module is module).output = output

    handles = [
        handle
        for module in causal_lm.modules()
        for handle in (
            module.register_forward_pre_hook(note, with_kwargs=True),
            module.register_forward_hook(note_output),
        )
    ]
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(causal_lm))
    try:
        with torch.no_grad(), evaluating(causal_lm):
            causal_lm(input_ids=ids, use_cache=False)
    except Exception as error:
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be run on token ids alone ({first_line(error)}); experts need a "
            "decoder-only causal LM"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls
