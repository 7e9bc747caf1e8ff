"""A hook that calls a function right after the first import of a module."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from typing_extensions import override

AUTO_CLASSES = "transformers.models.auto.modeling_auto"
"""Module of transformers that holds the registry of ``AutoModelForCausalLM``."""

PEFT = "peft"


def is_being_imported(module: str) -> bool:
    """Return whether the import of a module has started and not finished."""
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


class AfterImport(MetaPathFinder):
    """Import hook that calls a function once, after the first import of a module.

    Args:
        module: Full name of the module.
        then: Function to call, without arguments.
    """

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module or self not in sys.meta_path:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        sys.meta_path.insert(place, self)  # the caller may only ask for the spec and never import
        loader: Any = spec and spec.loader
        if loader is not None:
            execute_module = loader.exec_module

            def execute_and_then(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute_module(module)
                self._then()

            loader.exec_module = execute_and_then
        return spec
