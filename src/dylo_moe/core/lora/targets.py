"""Which modules of which decoder layers an expert adapts."""

from collections.abc import Iterable, Sequence

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylo_moe.core.base import argument_names
from dylo_moe.errors import ExpertError, ModelError, did_you_mean
from dylo_moe.spec import RoutingMode

_AUTO_TARGETS = ("q_proj", "v_proj", "k_proj", "o_proj", "query_key_value", "c_attn", "Wqkv")
"""Names of attention projections in the model families; by default an expert adapts those that the base model has."""

ALL_LINEAR, ATTENTION, MLP = "all-linear", "attention", "mlp"


_ADAPTER_PARTS = (".base_layer", ".lora_")


def base_modules(base_model: PreTrainedModel) -> list[str]:
    """Return the full names of a base model's modules, without those of adapters."""
    return [name for name, _ in base_model.named_modules() if not any(part in name for part in _ADAPTER_PARTS)]


def linear_modules(base_model: PreTrainedModel, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return the linear modules in the decoder layers that may carry experts, by their full names."""
    allowed = {id(module) for layer in layers for module in layer.modules()}
    found: dict[str, nn.Module] = {}
    for name in base_modules(base_model):
        module = base_model.get_submodule(name)
        bare = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if id(module) in allowed and isinstance(bare, nn.Linear | Conv1D):
            found[name] = bare
    return found


def part_of_layers(layers: Iterable[nn.Module], part: str) -> list[str]:
    """Return names of the linear modules in the attention or in the rest of decoder layers, sorted.

    A module that takes an ``attention_mask`` is attention. Each name is the last part of the module's full name, or
    its path in the layer where the other part has a module of that name.

    Args:
        layers: Decoder layers.
        part: ``attention`` or ``mlp``.
    """
    places: dict[str, set[str]] = {ATTENTION: set(), MLP: set()}
    for layer in layers:
        modules = dict(layer.named_modules())
        attention = [
            f"{name}." for name, module in modules.items() if name and "attention_mask" in argument_names(module)
        ]
        for name, module in modules.items():
            bare = module.get_base_layer() if isinstance(module, LoraLayer) else module
            if isinstance(bare, nn.Linear | Conv1D) and not any(inner in name for inner in _ADAPTER_PARTS):
                places[ATTENTION if name.startswith(tuple(attention)) else MLP].add(name)
    others = {name.rpartition(".")[2] for name in places[MLP if part == ATTENTION else ATTENTION]}
    lasts = {name: name.rpartition(".")[2] for name in places[part]}
    return sorted({name if last in others else last for name, last in lasts.items()})


def select_targets(
    base_model: PreTrainedModel, layers: Iterable[nn.Module], wanted: str | Sequence[str] | None
) -> tuple[list[str], bool]:
    """Return the last parts of the names of an expert's target modules, and whether their weights are transposed.

    Args:
        base_model: The model to adapt.
        layers: Decoder layers that may carry experts.
        wanted: Names of linear modules, ``"all-linear"``, ``"attention"``, ``"mlp"``, or None for those of
            ``_AUTO_TARGETS``.

    Returns:
        The names, and whether weights are stored as ``(in, out)`` (GPT-2's ``Conv1D``).

    Raises:
        ModelError: The base model has no such module.
    """
    layers = list(layers)
    linear = linear_modules(base_model, layers)
    have = sorted({name.rpartition(".")[2] for name in linear})
    family = type(base_model).__name__
    if wanted == ALL_LINEAR:
        targets = have
    elif wanted in (ATTENTION, MLP):
        targets = part_of_layers(layers, str(wanted))
        if not targets:
            raise ModelError(
                f"{family} has no linear modules in its {wanted} that experts can adapt; name some of its linear "
                f"modules with `target_modules`: {', '.join(have) or 'it has none'}"
            )
    elif wanted is None:
        targets = [name for name in _AUTO_TARGETS if name in have]
        if not targets:
            raise ModelError(
                f"{family} has none of the target modules {', '.join(_AUTO_TARGETS)}; "
                f"name some of its linear modules with `target_modules`: {', '.join(have) or 'it has none'}"
            )
    else:
        targets = [wanted] if isinstance(wanted, str) else list(wanted)
        for target in targets:
            if target not in have:
                raise ModelError(
                    f"`target_modules` must be linear modules of {family} ({', '.join(have)}), got {target!r}"
                    f"{did_you_mean(target, have)}"
                )
    selected = [module for name, module in linear.items() if name.endswith(tuple(f".{part}" for part in targets))]
    return targets, any(isinstance(module, Conv1D) for module in selected)


def check_experts_per_block(
    experts_per_block: Sequence[int] | None, num_experts: int, mode: RoutingMode, num_layers: int
) -> None:
    """Check the numbers of experts that blocks of layers are to carry.

    Args:
        experts_per_block: A number for each block, lowest block first; None for all experts in all layers.
        num_experts: Number of experts of the new mixture.
        mode: Routing mode; it must have a gate for each layer.
        num_layers: Number of decoder layers.

    Raises:
        ExpertError: The numbers do not fit the experts, the layers or the routing.
    """
    if experts_per_block is None:
        return
    if not experts_per_block or min(experts_per_block) < 1 or max(experts_per_block) != num_experts:
        raise ExpertError(
            f"`experts_per_layer` must be numbers from 1 to the number of experts ({num_experts}), and include that "
            f"number, got {list(experts_per_block)}"
        )
    if len(experts_per_block) > num_layers:
        raise ExpertError(
            f"`experts_per_layer` must have at most one number for each layer ({num_layers}), got "
            f"{len(experts_per_block)}"
        )
    if not mode.has_gate_per_layer:
        raise ExpertError(f"`experts_per_layer` needs `routing` per_layer, got {mode}")


def experts_per_layer(experts_per_block: Sequence[int], num_layers: int) -> list[int]:
    """Return the number of experts that each layer carries, given the numbers for blocks of about equal size.

    After MoLA (Gao et al. 2024, "Higher Layers Need More LoRA Experts", arXiv 2402.08562).
    """
    return [experts_per_block[layer * len(experts_per_block) // num_layers] for layer in range(num_layers)]


def layers_of_expert(
    index: int, first_layer: int, experts_per_block: Sequence[int] | None, num_layers: int
) -> list[int] | None:
    """Return the decoder layers that carry an expert; None for all of them.

    Args:
        index: The expert's number, in the order of creation.
        first_layer: First layer that may carry experts.
        experts_per_block: See ``experts_per_layer``. It applies to the experts that a mixture starts with; an expert
            that is added later is carried by all layers.
        num_layers: Number of decoder layers.
    """
    layers = list(range(first_layer, num_layers))
    if experts_per_block is not None and index < max(experts_per_block):
        layers = [
            layer for layer, count in enumerate(experts_per_layer(experts_per_block, num_layers)) if index < count
        ]
    return layers if len(layers) < num_layers else None
