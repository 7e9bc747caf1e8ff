"""Imitation of object storage mounted as a file system: folders below a root cannot be renamed.

Cloud Storage FUSE refuses renames like this for a bucket without a hierarchical namespace.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RENAMES = ("rename", "replace")


def install(root: Path, put: Callable[[object, str, object], None] = setattr) -> None:
    """Make ``root`` a bucket for this process; with pytest's ``monkeypatch.setattr`` as ``put``, for one test."""
    for name in RENAMES:
        put(os, name, _flat(root, getattr(os, name)))


def environment(root: Path, folder: Path) -> dict[str, str]:
    """Return the environment in which ``root`` is a bucket for new Python processes; it needs a file in ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.append({str(ROOT)!r})\n"
        f"from tests.support import flat_bucket\nflat_bucket.install(Path({str(root)!r}))\n"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def _flat(root: Path, real: Callable[..., None]) -> Callable[..., None]:
    def rename(source: Any, target: Any, **options: Any) -> None:
        below = any(Path(os.path.abspath(path)).is_relative_to(root) for path in (source, target))
        if below and os.path.isdir(source):
            raise OSError(errno.EMFILE, "Too many open files", str(source), None, str(target))
        real(source, target, **options)

    return rename
