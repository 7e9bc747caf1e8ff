"""Datasets as prompts and responses: ``get_dataset`` reads and splits one of ``AVAILABLE_DATASETS`` or a user's file.

The two names are imported when they are first used, so that importing the package stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dylo_moe.data.examples import get_dataset
    from dylo_moe.data.registry import AVAILABLE_DATASETS

__all__ = ["AVAILABLE_DATASETS", "get_dataset"]

_HOMES = {"AVAILABLE_DATASETS": "registry", "get_dataset": "examples"}


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
