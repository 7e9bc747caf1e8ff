"""LoRA experts on PEFT: a layer that mixes them by per-token weights, and their manager."""
