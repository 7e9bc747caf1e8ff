"""Checks before an adapter becomes an expert: its folder, its name, and its fit to the base model."""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from dylo_moe.core.base import folder_of
from dylo_moe.core.lora.adapter_files import ADAPTER_FILES, check_adapter
from dylo_moe.core.lora.targets import base_modules, linear_modules
from dylo_moe.errors import ExpertError

_NAMES_IN_KEYS = {"weight", "bias", "base_layer", "lora_A", "lora_B", "base_model", "model"}


def adapter_folder_of(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter, fetched where ``path`` is a Hub id.

    Raises:
        ExpertError: There is no such folder.
        CheckpointError: The repository cannot be fetched.
    """
    folder = folder_of(path, revision=revision, files=ADAPTER_FILES)
    if not folder.is_dir():
        raise ExpertError(f"there is no folder {str(path)!r} to import an adapter from")
    return folder


def check_import(
    folder: Path, name: str, base_model: PreTrainedModel, layers: Iterable[nn.Module], taken: Iterable[str]
) -> None:
    """Raise ``ExpertError`` unless an adapter folder can become an expert of this name; see ``import_adapter``."""
    modules = base_modules(base_model)
    check_new_name(name, taken, modules)
    check_adapter(folder, linear_modules(base_model, layers), modules)


def check_new_name(name: str, taken: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ``ExpertError`` unless a name is valid for a new expert, given the others' names and those of modules."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise ExpertError(f"an expert's name has letters, digits, _ and - only, got {name!r}")
    if name in taken:
        raise ExpertError(f"there is an expert {name!r} already; choose another name")
    # PEFT finds an adapter's tensors by its name in their keys, and stores it as an attribute
    parts = {part for module in modules for part in module.split(".")}
    if name in parts or name in _NAMES_IN_KEYS or name.isdigit() or hasattr(nn.ModuleDict, name):
        raise ExpertError(f"an expert cannot be called {name!r}: a module has that name; choose another one")
