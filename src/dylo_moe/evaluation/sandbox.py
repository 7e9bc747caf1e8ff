"""Runs an answer where it can do no harm, and takes back the lines that it wrote.

Three tiers; ``choose_sandbox`` takes the first that holds, and tries it out with a live canary before it trusts it:

1. bubblewrap: namespaces of its own for processes, files and network, the limits of ``setrlimit``, a seccomp filter.
2. Landlock and seccomp, with the same limits, as an unprivileged user where root can become one.
3. Limits alone, which keep out accidents and no malice: only if the user asks for it.

The environment is empty, nothing can be written, and nothing but an interpreter can be read. What is covered: code
that wants to pass without solving, to spy, to damage or to stay. Not covered: holes in the kernel.
"""

import contextlib
import itertools
import json
import os
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from dylo_moe.evaluation import confine
from dylo_moe.evaluation.answer_process import Request
from dylo_moe.evaluation.asleep import AsleepClock
from dylo_moe.evaluation.exposure import Exposure, exposure

MEMORY = 4 << 30
"""Bytes of address space of an answer, as EvalPlus has it."""

ASLEEP, ASLEEP_IN_ALL = 10.0, 60.0
"""Seconds that an answer may spend neither running nor waiting for a processor: on one call, and on all."""

START = (
    "import sys, types; package = types.ModuleType('dylo_moe'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['dylo_moe'] = package; from dylo_moe.evaluation.{module} import main; main()"
)
"""Imports one module without the package's own ``__init__``, which imports torch."""

_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
_FIRST_USER, _USERS = 1_879_000_000, 1 << 16
_users = itertools.count(os.getpid())

Status = Literal["finished", "timeout", "output", "died"]


@dataclass(frozen=True)
class Allowance:
    """What a run may use.

    Attributes:
        limits: Seconds of processor time for the code, and for each call.
        cpu: Seconds of processor time in all.
        output: Bytes that it may write.
    """

    limits: Sequence[float]
    cpu: int
    output: int


@dataclass(frozen=True)
class Run:
    """What came back: the lines, unread, and how the process ended."""

    status: Status
    lines: tuple[bytes, ...]
    detail: str


@dataclass(frozen=True)
class Namespace:
    """The first process of bubblewrap's namespace, with which all others in it end: number and descriptor."""

    first: int
    descriptor: int


@dataclass(frozen=True)
class Sandbox:
    """A tier, and how this machine can have it.

    Attributes:
        name: ``"bubblewrap"``, ``"landlock"`` or ``"none"``.
        program: bubblewrap's path.
        description: For the user.
    """

    name: str
    program: str | None
    description: str

    def run(
        self,
        code: str,
        entry_point: str,
        inputs: Sequence[bytes],
        allowance: Allowance,
        setup: str = "",
        names: Sequence[str] = (),
    ) -> Run:
        """Runs code and calls it on inputs; returns when no process of it is left.

        Args:
            code: A whole program that defines ``entry_point``.
            entry_point: The function to call.
            inputs: For each call, its list of arguments as ``wire`` encodes it.
            allowance: What it may use.
            setup: Code run after it, in its namespace.
            names: What ``setup`` makes.
        """
        request = self._request(code, entry_point, allowance, setup, names)
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as complaints:
            file.write(b"\n".join([json.dumps(request).encode(), *inputs]))
            file.seek(0)
            process, namespace = self._start(file, complaints)
            try:
                run = _collect(process, namespace, allowance)
            finally:
                _end(process, namespace)
            if run.status == "died" and not run.lines:  # before it ran any of the answer
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip().splitlines()
                run = Run("died", (), said[-1] if said else run.detail)
            return run

    def _request(self, code: str, entry_point: str, allowance: Allowance, setup: str, names: Sequence[str]) -> Request:
        root = _is_root()
        return {
            "code": code.encode("utf-8", "replace").decode(),
            "entry_point": entry_point,
            "setup": setup,
            "names": list(names),
            "limits": list(allowance.limits),
            "memory": MEMORY,
            "cpu": allowance.cpu,
            "count_processes": self.name == "bubblewrap" or (self.name == "landlock" and root),
            "user": _FIRST_USER + next(_users) % _USERS if root and self.name != "none" else None,
            "landlock": exposure().allowed() if self.name == "landlock" else None,
            "filter": self.name != "none" and confine.can_filter(),
            "packages": dict(exposure().packages),
        }

    def _start(self, request: IO[bytes], complaints: IO[bytes]) -> tuple[subprocess.Popen[bytes], Namespace | None]:
        told, tells = os.pipe()
        with os.fdopen(told, "rb") as information:
            try:
                process = subprocess.Popen(
                    self._command(tells),
                    stdin=request,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    env=_ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                    pass_fds=[tells] if self.program else [],
                )
            finally:
                os.close(tells)
            text = information.read()
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            first = json.loads(text)["child-pid"] if text else None
            return process, Namespace(first, os.pidfd_open(first)) if first else None
        return process, None

    def _command(self, tells: int) -> list[str]:
        seen, package = exposure(), str(Path(__file__).parents[1])
        python = [seen.interpreter, "-s", "-S", "-P", "-B", "-X", "utf8"]
        python += ["-c", START.format(module="answer_process"), package]
        return [*_bubblewrap(self.program, seen, tells), *python] if self.program else python


def _is_root() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0


def _bubblewrap(program: str, seen: Exposure, tells: int) -> Iterator[str]:
    """Returns bubblewrap and its arguments: an empty file system that cannot be written, with what is exposed in it."""
    yield from (program, "--die-with-parent", "--new-session", "--info-fd", str(tells), "--cap-drop", "ALL")
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--hostname", "sandbox")
    if _is_root():  # becomes an ordinary user inside, when everything is in place
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield "--unshare-user"
    # made beforehand, as bubblewrap would close the folders above a private one to the user that the answer becomes
    above = {str(parent) for path in (*seen.roots, *seen.package_files) for parent in Path(path).parents}
    for path in sorted(above - {"/", *(link for link, _ in seen.links)}):
        yield from ("--dir", path)
    for path in seen.roots:
        yield from ("--ro-bind", path, path)
    for link, target in seen.links:
        yield from ("--symlink", target, link)
    for path in seen.hidden:
        yield from ("--tmpfs", path)
    for path in seen.package_files:
        yield from ("--ro-bind", path, path)
    for path in (*seen.hidden, "/"):
        yield from ("--dev-bind", os.devnull, os.devnull) if path == "/" else ()
        yield from ("--remount-ro", path)
    yield from ("--chdir", "/", "--")


def _collect(process: subprocess.Popen[bytes], namespace: Namespace | None, allowance: Allowance) -> Run:
    """Reads lines until all are there, or the process ends, is asleep for too long, or has written too much."""
    assert process.stdout is not None
    descriptor, received, lines = process.stdout.fileno(), bytearray(), 0
    clock = AsleepClock(process.pid, namespace.first if namespace else None)
    last = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while lines < len(allowance.limits):
            if not selector.select(1.0):
                asleep = clock.seconds()
                if (asleep - last > ASLEEP or asleep > ASLEEP_IN_ALL) and not clock.runnable():
                    return Run("timeout", _lines(received), "it was asleep")
                continue
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                break
            received += chunk
            if b"\n" in chunk:
                lines += chunk.count(b"\n")
                last = clock.seconds()
            if len(received) > allowance.output:
                return Run("output", (), f"it wrote more than {allowance.output:,} bytes")
    if lines > len(allowance.limits):
        return Run("output", (), "it wrote more lines than it has inputs")
    if lines == len(allowance.limits):
        return Run("finished", _lines(received), "")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ASLEEP)
    return _ending(process.returncode, _lines(received))


def _lines(received: bytearray) -> tuple[bytes, ...]:
    return tuple(bytes(received).split(b"\n")[:-1])


def _ending(code: int | None, lines: tuple[bytes, ...]) -> Run:
    """What the exit code says; bubblewrap adds 128 to a signal where Python's own is negative."""
    if code == 0:
        return Run("finished", lines, "")
    if code is None:
        return Run("timeout", lines, "it closed its output and stayed")
    number = -code if code < 0 else code - 128
    if number in (signal.SIGPROF, signal.SIGXCPU):
        return Run("timeout", lines, "it used up its processor time")
    known = number in {member.value for member in signal.Signals}
    return Run("died", lines, signal.Signals(number).name if known else f"exit code {code}")


def _end(process: subprocess.Popen[bytes], namespace: Namespace | None) -> None:
    """Nothing of it is left when this returns: bubblewrap's namespace is gone, and with Landlock there is one process.

    Without a sandbox there may be more, of which those that stayed in their group are ended.
    """
    if namespace is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(namespace.descriptor, signal.SIGKILL)
        gone = select.poll()
        gone.register(namespace.descriptor)
        gone.poll()  # bubblewrap itself does not wait for that
        os.close(namespace.descriptor)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def candidates() -> Iterable[Sandbox]:
    """The tiers that this machine might have, the strongest first."""
    if sys.platform != "linux":
        return
    program = shutil.which("bwrap")
    if program:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
        yield Sandbox("bubblewrap", program, f"bubblewrap {version[-1] if version else '?'}, seccomp, limits")
    user = "unprivileged user" if _is_root() else "the user's own account"
    yield Sandbox("landlock", None, f"Landlock, seccomp, limits, {user}")


UNSAFE = Sandbox("none", None, "NO SANDBOX: limits only; an answer can read, write and send what you can")
