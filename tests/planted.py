"""A token that tests plant where a secret may be, and look for where none may be."""

from collections.abc import Iterable
from pathlib import Path

import psutil

TOKEN = "hf_plantedplantedplantedplanted"


def files_with_it(*places: Path) -> list[Path]:
    """The files among these, and below these folders, that hold the token."""
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return [file for file in files if file.is_file() and TOKEN.encode() in file.read_bytes()]


def processes_with_it() -> list[list[str]]:
    """The command lines on this machine that hold the token."""
    lines: Iterable[list[str] | None] = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if line and any(TOKEN in word for word in line)]
