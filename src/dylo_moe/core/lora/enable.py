"""Routing on unmodified PEFT: ``enable_routing`` makes ``model(input_ids, routing_weights=w)`` work.

The LoRA layers of a PEFT model get a forward that mixes the active adapters by per-token weights. Parameters, names,
files and every other PEFT method stay as they are, quantized base layers included. Where no weights are given, PEFT's
own forward runs.

Not covered: LoRA variants that do not add ``B A x`` (DoRA and others), LoRA on embeddings and convolutions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dylo_moe.core.lora.extension import Extension, extend, restore
from dylo_moe.core.lora.forward import RoutedCausalLM, RoutedCheckpoint
from dylo_moe.core.lora.layer import LayerMixer, RoutedLayer
from dylo_moe.core.lora.shared_input import SHARED_INPUT_NAMES, SharedInputGroup
from dylo_moe.core.lora.state import RoutingState
from dylo_moe.errors import RoutingError

_LINEAR = (
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "QuantLinear",
    "TorchaoLoraLinear",
)
"""Class names of PEFT's layers that add ``B A x`` to the output of a linear layer. Each but the first needs a library
of its own. A class that PEFT adds later is refused until it has been checked."""


class RoutedTuner(Extension):
    """Methods that PEFT's own model gains: unloading the adapters takes all of routing off the base model."""

    overrides = ("unload", "merge_and_unload")
    routing: RoutingState

    def unload(self, *args: object, **kwargs: object) -> nn.Module:
        """Do as PEFT does, and leave a plain base model."""
        return _without_routing(self, self.extended_from.unload(self, *args, **kwargs))

    def merge_and_unload(self, *args: object, **kwargs: object) -> nn.Module:
        """Do as PEFT does, and leave a plain base model."""
        return _without_routing(self, self.extended_from.merge_and_unload(self, *args, **kwargs))


def enable_routing(model: PeftModel) -> RoutingState:
    """Make ``routing_weights`` an argument of a PEFT model with LoRA adapters.

    ``model(input_ids, routing_weights=w)`` then mixes the active adapters by ``w``, of shape
    ``(batch, seq, num_active_adapters)`` in the order of ``model.active_adapters``, with gradients to ``w``.
    One-hot weights equal that adapter alone, all-zero weights equal the base. Without the argument the model is
    PEFT as before. May be called again after adapters were added: only new layers are changed.
    ``model.unload()`` and ``model.merge_and_unload()`` take it all off.

    Returns:
        The state that the routed layers share.

    Raises:
        RoutingError: ``model`` is not a PEFT model, has no LoRA layer, or has one that cannot be routed. It is then
            unchanged.
    """
    if not isinstance(model, PeftModel):
        raise RoutingError(
            f"enable_routing needs a peft.PeftModel, got a {type(model).__name__}; make one with peft.get_peft_model, "
            "or a mixture with DyLoRA_MoE"
        )
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner) or not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise RoutingError(f"routing needs a model with LoRA adapters, and {type(model).__name__} has none")
    return _route_layers(tuner)


def _route_layers(tuner: Any) -> RoutingState:
    """Give every LoRA layer that has none a mixer, and the causal LM and the tuner their methods."""
    causal_lm = tuner.model
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, layer in layers:
        _check_layer(name, layer)
    state: RoutingState = vars(causal_lm).get("routing") or RoutingState()
    state.route_new_adapters = partial(_route_new_adapters, tuner)
    state.adapters = tuple(tuner.peft_config)
    extend(causal_lm, RoutedCausalLM, routing=state)
    extend(tuner, RoutedTuner, routing=state)
    for _, layer in layers:
        if not isinstance(layer, RoutedLayer):
            extend(layer, RoutedLayer, mixer=LayerMixer(layer, state))
    _group_by_input(causal_lm)
    return state


def _route_new_adapters(tuner: Any) -> None:
    """Route the layers of adapters that were added since."""
    if tuple(tuner.peft_config) != tuner.routing.adapters:
        _route_layers(tuner)


def _without_routing(tuner: Any, unloaded: nn.Module) -> nn.Module:
    """Take the methods and the state of routing off a base model whose LoRA layers are gone, and return it."""
    state, causal_lm = tuner.routing, tuner.model
    if state.hooks is not None:
        state.hooks.remove()
    for module in causal_lm.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, RoutedCheckpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint
    for thing, extension in ((causal_lm, RoutedCausalLM), (tuner, RoutedTuner)):
        restore(thing, extension)
        vars(thing).pop("routing", None)
    return unloaded


def _group_by_input(causal_lm: nn.Module) -> None:
    """Put sibling layers that read the same tensor, as far as their names show, into one group."""
    for module in causal_lm.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUT_NAMES:
            layers: Sequence[Any] = [children[name] for name in names if isinstance(children.get(name), RoutedLayer)]
            group = SharedInputGroup(layers)
            for layer in layers:
                layer.mixer.group = group


def _check_layer(name: str, layer: LoraLayer) -> None:
    """Raise ``RoutingError`` unless a LoRA layer can be routed."""
    if layer.lora_variant:
        adapter, variant = next(iter(layer.lora_variant.items()))
        raise RoutingError(
            f"adapter {adapter!r} uses {type(variant).__name__} at {name}; only plain LoRA and rsLoRA can be routed"
        )
    if any(layer.lora_bias.values()):
        raise RoutingError(f"lora_bias is set at {name}; train the adapter with lora_bias=False to route it")
    if not isinstance(layer, RoutedLayer) and "forward" in vars(layer):
        raise RoutingError(
            f"the forward of {name} was replaced, by another way to mix adapters (X-LoRA) or by offloading; enable "
            "routing on a plain LoRA model, before it is offloaded"
        )
    own = layer.extended_from if isinstance(layer, RoutedLayer) else type(layer)
    if own.__name__ not in _LINEAR or not own.__module__.startswith("peft.tuners.lora."):
        raise RoutingError(
            f"{name} is adapted by {own.__module__}.{own.__name__}; only LoRA on linear layers can be routed, leave it "
            "out"
        )
