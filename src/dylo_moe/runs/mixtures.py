"""Load a mixture and its tokenizer, onto the accelerator if there is one."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dylo_moe.core import DyLoRA_MoE, load_tokenizer


def load_mixture(path: str | Path, base_model: str | None = None) -> tuple[DyLoRA_MoE, PreTrainedTokenizerBase]:
    """Return a mixture that is ready to evaluate, and its tokenizer.

    Args:
        path: Folder of the mixture, or its id on the Hub.
        base_model: Folder or Hub id of the base model, if it has moved since the mixture was saved.

    Raises:
        DyLoRAError: The mixture, its base model or its tokenizer cannot be loaded.
    """
    model = DyLoRA_MoE.from_pretrained(path, base_model)
    to_device(model)
    return model, _tokenizer_of(model)


def _tokenizer_of(model: DyLoRA_MoE) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder of a loaded mixture, or else that of its base model.

    Raises:
        ModelError: The tokenizer cannot be loaded.
    """
    folder = Path(model.name_or_path or "")
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    return load_tokenizer(model.base_name, revision=model.revision)


def to_device(model: nn.Module) -> None:
    """Move a model to the accelerator, if there is one."""
    if torch.accelerator.is_available():
        nn.Module.to(model, torch.accelerator.current_accelerator())
