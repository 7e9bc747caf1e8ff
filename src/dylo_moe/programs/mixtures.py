"""Load a mixture for a program: with its tokenizer, on the accelerator where there is one."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dylo_moe.core.base_model import load_tokenizer
from dylo_moe.core.model import DyLoRA_MoE


def load_mixture(path: str | Path, base_model: str | None = None) -> tuple[DyLoRA_MoE, PreTrainedTokenizerBase]:
    """Return a mixture that is ready to evaluate, and its tokenizer.

    Args:
        path: Its folder, or a Hub id.
        base_model: Where its base is, if not where the mixture says.

    Raises:
        DyLoRAError: The mixture, its base or its tokenizer cannot be had.
    """
    model = DyLoRA_MoE.from_pretrained(path, base_model)
    to_device(model)
    return model, tokenizer_of(model)


def tokenizer_of(model: DyLoRA_MoE) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a loaded mixture's folder; its base model's where the folder has none.

    Raises:
        ModelError: It cannot be had.
    """
    folder = Path(model.name_or_path or "")
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    return load_tokenizer(model.base_name, revision=model.revision)


def to_device(model: nn.Module) -> None:
    """Move a model to the accelerator, where there is one."""
    if torch.accelerator.is_available():
        nn.Module.to(model, torch.accelerator.current_accelerator())
