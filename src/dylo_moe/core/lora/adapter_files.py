"""A PEFT adapter folder, read and checked before any model is changed.

A folder that passes loads: its configuration is plain LoRA, and its tensors are exactly those that PEFT will make for
the base model. A refusal leaves nothing to undo.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.errors import ExpertError, first_line

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_KEY_PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_NOT_ROUTED = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias")
"""Options of ``LoraConfig`` that change more than the sum with ``B A x``."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder.

    Raises:
        ExpertError: The file is missing or damaged.
    """
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ExpertError(f"{folder / WEIGHTS_FILE} cannot be read: {first_line(error)}") from error


def check_adapter(folder: Path, linear: Mapping[str, nn.Module], module_names: list[str]) -> None:
    """Raise ``ExpertError`` unless a folder has a LoRA adapter that can be routed on a base model.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        linear: Linear modules that may carry experts, by their full names.
        module_names: Full names of all modules of the base model.
    """
    config = _read_config(folder)
    wrong = _unroutable(config) or _misplaced(config, linear, module_names)
    if wrong is None:
        shapes = {key.removeprefix(_KEY_PREFIX): shape for key, shape in tensor_shapes(read_weights(folder)).items()}
        wrong = first_shape_mismatch(shapes, _expected_shapes(config, linear))
    if wrong is not None:
        raise ExpertError(f"the adapter {folder} cannot become an expert of this model: {wrong}")


def first_shape_mismatch(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the first difference between two sets of tensor shapes in words; None if they are equal."""
    for key in sorted(got.keys() | wanted.keys()):
        if key not in got:
            return f"it has no {key}"
        if key not in wanted:
            return f"it has {key}, which does not belong there"
        if got[key] != wanted[key]:
            return f"its {key} is {got[key]}, and {wanted[key]} is needed"
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json`` as they are in the file.

    Raises:
        ExpertError: The file is missing or damaged.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ExpertError(f"{folder / CONFIG_FILE} cannot be read: {first_line(error)}") from error
    return config


def module_of(key: str) -> str:
    """Return the full name of the module that a tensor of an adapter file adapts."""
    return key.removeprefix(_KEY_PREFIX).removesuffix(DOWN).removesuffix(UP)


def scalings(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the factor by which PEFT multiplies ``B A`` of each module, by the module's full name."""
    patterns = config.get("alpha_pattern") or {}
    found = {}
    for key, down in weights.items():
        if not key.endswith(DOWN):
            continue
        module = module_of(key)
        alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
        rank = down.shape[0]
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of named tensors."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _read_config(folder: Path) -> LoraConfig:
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise ExpertError(f"{folder} is not a PEFT adapter that can be imported: it has no {file}")
    try:
        json.loads((folder / CONFIG_FILE).read_text())  # PEFT would look on the Hub for a file that it cannot read
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ExpertError(f"{folder / CONFIG_FILE} cannot be read: {first_line(error)}") from error
    if not isinstance(config, LoraConfig):
        raise ExpertError(f"the adapter {folder} is of type {config.peft_type}; only LoRA adapters can be routed")
    return config


def _unroutable(config: LoraConfig) -> str | None:
    """Return in words what a configuration has beyond plain LoRA; None for plain LoRA."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    for name in (*sorted(variants), *_NOT_ROUTED):
        if getattr(config, name):
            return f"it uses {name}, and only plain LoRA and rsLoRA can be routed"
    if config.init_lora_weights in fields["init_lora_weights"].metadata.get("lora_variants", ()):
        return f"it uses {config.init_lora_weights}, and only plain LoRA and rsLoRA can be routed"
    if config.bias != "none":
        return f"it trained biases of the base (bias={config.bias!r}), which all experts share"
    return None


def _misplaced(config: LoraConfig, linear: Mapping[str, nn.Module], module_names: list[str]) -> str | None:
    for name in module_names:
        if name not in linear and check_target_module_exists(config, name):
            return (
                f"it adapts {name}, which is not a linear module of the decoder layers that carry experts; "
                "with routing prefix:K, layers below K carry none"
            )
    return None


def _expected_shapes(config: LoraConfig, linear: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in linear.items():
        if check_target_module_exists(config, name):
            ranks = config.rank_pattern or {}
            rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
            columns, rows = _in_and_out_features(module)
            shapes[f"{name}.lora_A.weight"] = (rank, columns)
            shapes[f"{name}.lora_B.weight"] = (rows, rank)
    return shapes


def _in_and_out_features(module: nn.Module) -> tuple[int, int]:
    """Return the input and output widths of a linear module."""
    if isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        return columns, rows
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def write_adapter(folder: Path, peft_model: PeftModel, name: str, state: dict[str, Tensor] | None = None) -> None:
    """Write one adapter as PEFT does, but always into ``folder`` itself, whatever its name."""
    scratch = folder.with_name(f".{folder.name}-peft")
    peft_model.save_pretrained(str(scratch), selected_adapters=[name], save_embedding_layers=False, state_dict=state)
    # PEFT writes an adapter called "default" into the folder, and any other into a subfolder of its name
    written = scratch if name == "default" else scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        (written / file).rename(folder / file)
    shutil.rmtree(scratch)
