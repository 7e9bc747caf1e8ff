"""DyLoRA-MoE: LoRA experts on one frozen causal language model, mixed per token by a learned router."""

import logging
import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from dylo_moe.registration import AUTO_CLASSES, PEFT, AfterImport, is_being_imported

if TYPE_CHECKING:
    from dylo_moe.core.configuration import DyLoRAConfig
    from dylo_moe.core.lora.enable import enable_routing
    from dylo_moe.core.lora.manager import ExpertManager
    from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
    from dylo_moe.core.routing.router import DynamicHybridRouter
    from dylo_moe.errors import DyLoRAError

__all__ = [
    "DyLoRAConfig",
    "DyLoRAError",
    "DyLoRAOutput",
    "DyLoRA_MoE",
    "DynamicHybridRouter",
    "ExpertManager",
    "enable_routing",
]

# on import, bitsandbytes warns that a faster 4-bit kernel is missing, also where no model has 4 bits
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = version("dylora-moe")

_HOMES = {
    "DyLoRAConfig": "core.configuration",
    "DyLoRAError": "errors",
    "DyLoRAOutput": "core.model",
    "DyLoRA_MoE": "core.model",
    "DynamicHybridRouter": "core.routing.router",
    "ExpertManager": "core.lora.manager",
    "enable_routing": "core.lora.enable",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use: the command line shows its help and sets its warning filters before torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _register() -> None:
    import_module(f"{__name__}.core.model")


def _register_or_wait_for_peft() -> None:
    # PEFT imports the Auto classes half-way through its own import, and registration needs all of PEFT
    if not is_being_imported(PEFT):
        _register()


# `import dylo_moe` registers mixtures with transformers' Auto classes, and imports neither them nor torch itself
if AUTO_CLASSES in sys.modules:
    _register()
else:
    sys.meta_path[:0] = [AfterImport(AUTO_CLASSES, _register_or_wait_for_peft), AfterImport(PEFT, _register)]
