"""Adapters for tools that scale only by ``lora_alpha / r``.

PEFT can also scale by ``lora_alpha / sqrt(r)`` (rsLoRA), and by an alpha and a rank for each module (patterns).
llama.cpp and LoRAX read only ``lora_alpha`` and ``r``, and vLLM does not support patterns. Here any other scaling is
folded into the weights, so that the adapter adds the same to the base. Training such a copy further differs from
training the original, because its gradients are scaled differently.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dylo_moe.core.lora.adapter_files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    DOWN,
    WEIGHTS_FILE,
    module_of,
    read_config,
    read_weights,
    scalings,
)
from dylo_moe.errors import CheckpointError

_OTHER_SCALINGS = ("use_rslora", "rank_pattern", "alpha_pattern")


def check_target(folder: Path) -> None:
    """Raise ``CheckpointError`` unless a folder is new, empty, or holds only an adapter."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and writing would replace it; choose a new or empty folder")
    if not folder.exists():
        return
    other = sorted({file.name for file in folder.iterdir()} - {*ADAPTER_FILES})
    if other:
        raise CheckpointError(
            f"{folder} holds other files ({other[0]}), and writing would replace them; choose a new or empty folder"
        )


def make_plain(folder: Path) -> None:
    """Rewrite an adapter folder so that ``lora_alpha / r`` scales every module; leave a plain one unchanged.

    Raises:
        ExpertError: A file cannot be read.
    """
    config = read_config(folder)
    if not any(config.get(name) for name in _OTHER_SCALINGS):
        return
    config, weights = folded(config, read_weights(folder))
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def folded(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an equivalent adapter with one rank and one scaling, ``lora_alpha / r``.

    Smaller ranks are padded with zeros. If one integer ``lora_alpha`` fits all modules, ``B`` keeps its bits.
    Otherwise ``lora_alpha`` is ``r``, and ``B`` is multiplied by its module's scaling, in float32 at least.

    Args:
        config: Fields of ``adapter_config.json``.
        weights: ``A``, ``(rank, in)``, and ``B``, ``(out, rank)``, by their keys in the file.

    Returns:
        The new fields and tensors.
    """
    factors = scalings(config, weights)
    rank = max(tensor.shape[0] for key, tensor in weights.items() if key.endswith(DOWN))
    alphas = {factor * rank for factor in factors.values()}
    alpha, whole = rank, len(alphas) == 1 and next(iter(alphas)).is_integer()
    if whole:
        alpha = int(next(iter(alphas)))
    plain = {}
    for key, tensor in weights.items():
        if key.endswith(DOWN):
            plain[key] = F.pad(tensor, (0, 0, 0, rank - tensor.shape[0])).contiguous()
        else:
            if not whole:
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factors[module_of(key)]
            plain[key] = F.pad(tensor, (0, rank - tensor.shape[1])).contiguous()
    plain_fields = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return {**config, **plain_fields}, plain
