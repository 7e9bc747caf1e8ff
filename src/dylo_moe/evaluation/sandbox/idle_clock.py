"""Measures the idle time of a process, excluding the time that it spent waiting for a CPU."""

import os
import time
from contextlib import suppress
from pathlib import Path


class IdleClock:
    """Seconds in which an answer neither ran nor waited for a CPU.

    Args:
        process: Number of the process that was started.
        first: Number of the first process of the namespace that it made; its children count too. None without one.
    """

    def __init__(self, process: int, first: int | None) -> None:
        self._processes, self._first = [process] if first is None else [process, first], first
        self._start = time.monotonic()
        self._busy = 0.0

    def is_runnable(self) -> bool:
        """Return whether it runs or waits for a CPU: a wait is counted only when it ends, so a long one seems idle."""
        for process in self._all():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "R":
                    return True
        return False

    def seconds(self) -> float:
        """Return the idle seconds since the start."""
        busy = sum(map(_busy_seconds, self._all()))
        self._busy = max(self._busy, busy)  # the sum drops when a process ends
        return time.monotonic() - self._start - self._busy

    def _all(self) -> list[int]:
        try:
            children = Path(f"/proc/{self._first}/task/{self._first}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # there is no namespace, or it has ended
            children = []
        return [*self._processes, *map(int, children)]


def _busy_seconds(process: int) -> float:
    """Return the seconds in which a process ran or waited for a CPU; without the waits if the kernel has no count."""
    folder = Path(f"/proc/{process}")
    try:
        if (folder / "schedstat").exists():
            ran, waited, _ = (folder / "schedstat").read_text().split()
            return (int(ran) + int(waited)) / 1e9
        user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0
