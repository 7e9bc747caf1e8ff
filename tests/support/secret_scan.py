"""A secret token that tests plant, and searches for it where no secret may be."""

from collections.abc import Iterable
from pathlib import Path

import psutil

TOKEN = "hf_plantedplantedplantedplanted"


def files_with_it(*places: Path) -> list[Path]:
    """Return the files among these places, or below them, that contain the token."""
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return [file for file in files if file.is_file() and TOKEN.encode() in file.read_bytes()]


def processes_with_it() -> list[list[str]]:
    """Return the command lines of running processes that contain the token."""
    lines: Iterable[list[str] | None] = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if line and any(TOKEN in word for word in line)]
