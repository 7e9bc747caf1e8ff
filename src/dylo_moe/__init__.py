"""DyLoRA-MoE: LoRA experts on one frozen causal language model, mixed per token by a learned router."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dylo_moe.core.expert import ExpertManager
    from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
    from dylo_moe.core.routed_lora import enable_routing
    from dylo_moe.core.router import DynamicHybridRouter
    from dylo_moe.errors import DyLoRAError

__all__ = ["DyLoRAError", "DyLoRAOutput", "DyLoRA_MoE", "DynamicHybridRouter", "ExpertManager", "enable_routing"]

__version__ = version("dylora-moe")

_HOMES = {
    "DyLoRAError": "errors",
    "DyLoRAOutput": "core.model",
    "DyLoRA_MoE": "core.model",
    "DynamicHybridRouter": "core.router",
    "ExpertManager": "core.expert",
    "enable_routing": "core.routed_lora",
}


def __getattr__(name: str) -> object:
    """Imports what is asked for only then: the command line has its help, and its say on warnings, before torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
