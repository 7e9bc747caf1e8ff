"""A disk that has no room for one file, in a new Python process: the file opens, and writing it fails."""

import os
from pathlib import Path

PATCH = """
import pathlib

open_path = pathlib.Path.open


def open_on_full_disk(path, mode="r", *rest, **options):
    if path.name.startswith({prefix!r}):
        return open("/dev/full", "w", encoding="utf-8")
    return open_path(path, mode, *rest, **options)


pathlib.Path.open = open_on_full_disk
"""


def environment(name: str, folder: Path) -> dict[str, str]:
    """Return the environment of a process that cannot write ``name`` atomically; ``folder`` is for its set-up file."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATCH.format(prefix=f".{name}-"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
