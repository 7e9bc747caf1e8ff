"""DyLoRA-MoE: LoRA experts on one frozen causal language model, mixed per token by a learned router."""

from importlib.metadata import version

from dylo_moe.core.expert import ExpertManager
from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.core.routed_lora import enable_routing
from dylo_moe.core.router import DynamicHybridRouter
from dylo_moe.errors import DyLoRAError

__all__ = ["DyLoRAError", "DyLoRAOutput", "DyLoRA_MoE", "DynamicHybridRouter", "ExpertManager", "enable_routing"]

__version__ = version("dylora-moe")
