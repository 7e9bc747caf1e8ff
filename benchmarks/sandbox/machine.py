"""Targets that a hostile answer could reach, and its effects; for ``benchmarks.sandbox`` and ``others.py``."""

import os
import socket
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKEN = "HOSTILE_TOKEN"


@contextmanager
def machine(folder: Path) -> Iterator[dict[str, Any]]:
    """Set up targets for a hostile program: a private file, a folder, a port, a token, packages, the judge."""
    private, outside = folder / "home" / "private", folder / "outside"
    private.parent.mkdir()
    outside.mkdir()
    private.write_text("secret")
    for path, mode in ((folder, 0o777), (private.parent, 0o777), (outside, 0o777), (private, 0o644)):
        path.chmod(mode)  # the sandbox must refuse access, not the permissions
    os.environ[TOKEN] = "secret"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "folder": str(outside),
            "private": str(private),
            "port": server.getsockname()[1],
            "token": TOKEN,
            "judge": os.getpid(),
            "packages": sysconfig.get_paths()["purelib"],
        }
    del os.environ[TOKEN]


def harm(places: dict[str, Any]) -> list[str]:
    """Return what changed on the machine."""
    changed = [f"wrote {path.name}" for path in sorted(Path(places["folder"]).iterdir())]
    if Path(places["private"]).stat().st_mode & 0o777 != 0o644:
        changed.append("changed the mode of a private file")
    return changed


def processes(all_processes: bool = False) -> set[int]:
    """Return the ids of this process's running children, or of all processes but this one and process 1."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended in between
        number = int(path.parent.name)
        if state != "Z" and number not in (1, os.getpid()) and (all_processes or int(parent) == os.getpid()):
            found.add(number)
    return found
