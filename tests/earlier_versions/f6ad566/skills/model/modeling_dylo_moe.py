"""For AutoModelForCausalLM with trust_remote_code=True; needs the package dylora-moe."""

from dylo_moe import DyLoRA_MoE, DyLoRAConfig

__all__ = ["DyLoRAConfig", "DyLoRA_MoE"]
