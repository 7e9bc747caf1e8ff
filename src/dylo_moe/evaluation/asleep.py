"""How long a process has been asleep, told apart from how long a busy machine has let it wait."""

import os
import time
from pathlib import Path


class AsleepClock:
    """Seconds in which an answer neither ran nor waited for a processor.

    Args:
        process: What was started.
        first: The first process of the namespace that it made, whose children count too.
    """

    def __init__(self, process: int, first: int | None) -> None:
        self._processes, self._first = [process] if first is None else [process, first], first
        self._start = time.monotonic()
        self._awake = 0.0

    def runnable(self) -> bool:
        """Whether it runs or waits to: a wait is counted when it is over, so that a long one looks like sleep."""
        return any(_state(process) == "R" for process in self._all())

    def seconds(self) -> float:
        """Since the start."""
        awake = sum(map(_awake, self._all()))
        self._awake = max(self._awake, awake)  # what has ended is no longer counted
        return time.monotonic() - self._start - self._awake

    def _all(self) -> list[int]:
        return [*self._processes, *_children(self._first)]


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


def _awake(process: int) -> float:
    """Seconds in which a process ran, or waited to; where the kernel does not count the waiting, in which it ran."""
    folder = Path(f"/proc/{process}")
    try:
        if (folder / "schedstat").exists():
            ran, waited, _ = (folder / "schedstat").read_text().split()
            return (int(ran) + int(waited)) / 1e9
        user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0


def _children(process: int | None) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
