"""Adapters that PEFT alone made, of three kinds, on the tiny base model."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.families import stir

KINDS: dict[str, dict[str, object]] = {
    "everywhere": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank_stabilized": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 32},
    },
}


def write_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """Write an adapter of each kind with random weights, and return their folders by kind."""
    for seed, (kind, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
        stir(model, seed + 10)
        model.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


def with_adapter(base: Path, adapter: Path) -> PeftModel:
    """Return the base model with one adapter, by PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
