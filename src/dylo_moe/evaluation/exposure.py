"""What of this machine the process that runs an answer may read: an interpreter with its standard library, and numpy.

Not its other packages: among them are the benchmarks' own, with the solutions. Not ``/etc``, ``/proc``, ``/home``.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = ("numpy",)
"""What answers may import besides the standard library, as in EvalPlus's own image."""

OWN_FILES = ("__init__.py", "answer_process.py", "confine.py", "wire.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@dataclass(frozen=True)
class Exposure:
    """Paths that may be read.

    Attributes:
        interpreter: The Python to run.
        roots: Files and folders.
        hidden: Folders beneath the roots that may not be read.
        links: Symbolic links among the system's folders, and where they point.
        packages: The folder of each package.
        package_files: Folders of the packages and of the shared libraries that they bring.
    """

    interpreter: str
    roots: tuple[str, ...]
    hidden: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]
    package_files: tuple[str, ...]

    def allowed(self) -> list[str]:
        """The roots, with those that hold something hidden replaced by their other contents, and the packages."""
        found = [path for root in self.roots for path in _without(Path(root), {Path(path) for path in self.hidden})]
        return sorted({*found, *self.package_files})


@cache
def exposure() -> Exposure:
    """Looks at the running interpreter."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    own = Path(__file__).parent
    prefix = [Path(sys.base_prefix) / name for name in ("lib", "lib64")]
    folders = [Path(path) for path in _LIBRARIES]
    roots = [path for path in (*folders, *prefix) if path.is_dir() and not path.is_symlink()]
    roots = [path for path in roots if not any(other in path.parents for other in roots)]
    files = [Path(interpreter), Path("/etc/ld.so.cache"), *(own / name for name in OWN_FILES)]
    hidden = {folder for root in roots for folder in root.glob("python*/*-packages") if folder.is_dir()}
    packages = {name: folder for name in PACKAGES if (folder := _package(name))}
    libraries = [str(Path(folder).with_name(f"{name}.libs")) for name, folder in packages.items()]
    return Exposure(
        interpreter=interpreter,
        roots=tuple(str(path) for path in (*dict.fromkeys(roots), *files) if path.exists()),
        hidden=tuple(sorted(map(str, hidden))),
        links=tuple((str(path), os.readlink(path)) for path in folders if path.is_symlink()),
        packages=tuple(packages.items()),
        package_files=tuple(path for path in (*packages.values(), *libraries) if Path(path).exists()),
    )


def _package(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def _without(path: Path, hidden: set[Path]) -> Iterator[str]:
    """The path, or, if something hidden is in it, what else is."""
    if path in hidden:
        return
    if path.is_dir() and any(path in other.parents for other in hidden):
        for child in path.iterdir():
            yield from _without(child, hidden)
    elif path.exists():
        yield str(path)
