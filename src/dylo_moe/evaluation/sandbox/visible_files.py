"""Files of this machine that an answer's process may read: Python, its standard library, numpy and ``candidate``.

Other packages stay hidden: the benchmarks' own hold the solutions. So do ``/etc``, ``/proc``, ``/home`` and the rest of
this project.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dylo_moe.evaluation.candidate import process

PACKAGES = ("numpy",)
"""Packages that answers may import besides the standard library, as in EvalPlus's own image."""

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@dataclass(frozen=True)
class VisibleFiles:
    """Paths that an answer may read.

    Attributes:
        interpreter: The Python to run.
        roots: Files and folders.
        hidden: Folders inside the roots that may not be read.
        links: Symbolic links among the system's folders, and their targets.
        packages: Names and folders of the packages that an answer may import.
        package_files: Folders of these packages, of the shared libraries that they bring, and of ``candidate``;
            visible also where they are inside a hidden folder.
    """

    interpreter: str
    roots: tuple[str, ...]
    hidden: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]
    package_files: tuple[str, ...]

    def allowed(self) -> list[str]:
        """Return every visible path; a root with a hidden folder inside is replaced by its other contents."""
        found = [path for root in self.roots for path in _without(Path(root), {Path(path) for path in self.hidden})]
        return sorted({*found, *self.package_files})


@cache
def visible_files() -> VisibleFiles:
    """Return the visible files for the running interpreter."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefix = [Path(sys.base_prefix) / name for name in ("lib", "lib64")]
    folders = [Path(path) for path in _LIBRARIES]
    roots = [path for path in (*folders, *prefix) if path.is_dir() and not path.is_symlink()]
    roots = [path for path in roots if not any(other in path.parents for other in roots)]
    files = [Path(interpreter), Path("/etc/ld.so.cache")]
    hidden = {folder for root in roots for folder in root.glob("python*/*-packages") if folder.is_dir()}
    packages = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            packages[name] = spec.submodule_search_locations[0]
    libraries = [str(Path(folder).with_name(f"{name}.libs")) for name, folder in packages.items()]
    own = str(Path(process.__file__).parent)
    return VisibleFiles(
        interpreter=interpreter,
        roots=tuple(str(path) for path in (*dict.fromkeys(roots), *files) if path.exists()),
        hidden=tuple(sorted(map(str, hidden))),
        links=tuple((str(path), os.readlink(path)) for path in folders if path.is_symlink()),
        packages=tuple(packages.items()),
        package_files=tuple(path for path in (*packages.values(), *libraries, own) if Path(path).exists()),
    )


def _without(path: Path, hidden: set[Path]) -> Iterator[str]:
    """Yield the path, or its contents that are not hidden where it holds something hidden."""
    if path in hidden:
        return
    if path.is_dir() and any(path in other.parents for other in hidden):
        for child in path.iterdir():
            yield from _without(child, hidden)
    elif path.exists():
        yield str(path)
