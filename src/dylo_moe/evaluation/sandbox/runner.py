"""Runs an answer where it can do no harm, and returns the lines that it wrote.

There are three tiers; ``choose_sandbox`` takes the first that passes a live test:

1. bubblewrap: its own namespaces for processes, files and network, the limits of ``setrlimit``, a seccomp filter.
2. Landlock and seccomp, with the same limits; where root starts it, as an unprivileged user.
3. Limits only, which stop accidents but not malice: only if the user asks for it.

In the first two, the environment is empty, nothing can be written, and only ``VisibleFiles`` can be read. Covered: code
that tries to pass without solving the task, to spy, to damage or to stay. Not covered: holes in the kernel.
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

from dylo_moe.evaluation.candidate import confinement, process
from dylo_moe.evaluation.sandbox.idle_clock import IdleClock
from dylo_moe.evaluation.sandbox.visible_files import VisibleFiles, visible_files

MEMORY = 4 << 30
"""Bytes of address space of an answer, as in EvalPlus."""

MAX_IDLE, MAX_IDLE_IN_TOTAL = 10.0, 60.0
"""Seconds that an answer may spend neither running nor waiting for a CPU: in one call, and in all calls."""

_START = """\
import sys, types
for name, path in {packages!a}.items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = path
from {module} import main
main()
"""
"""Program that runs the ``main`` of one module."""

_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
_FIRST_USER, _USERS = 1_879_000_000, 1 << 16
_users = itertools.count(os.getpid())

Status = Literal["finished", "timeout", "output", "died"]


@dataclass(frozen=True)
class ResourceLimits:
    """Limits of one run.

    Attributes:
        call_seconds: Seconds of CPU time: first for the code itself, then for each call.
        cpu_seconds: Seconds of CPU time in total.
        output_bytes: Bytes of output.
    """

    call_seconds: Sequence[float]
    cpu_seconds: int
    output_bytes: int


@dataclass(frozen=True)
class SandboxRun:
    """Result of one run.

    Attributes:
        status: ``finished`` wrote all its lines, or exited with code 0; ``timeout`` took too long; ``output`` wrote too
            much; ``died`` was ended by a signal, or exited with another code.
        lines: Lines that the process wrote. Untrusted.
        detail: For a person: why it did not finish.
    """

    status: Status
    lines: tuple[bytes, ...]
    detail: str


@dataclass(frozen=True)
class Namespace:
    """First process of a bubblewrap namespace, with which all others in it end.

    Attributes:
        first: Number of the process.
        descriptor: File descriptor that refers to it.
    """

    first: int
    descriptor: int


@dataclass(frozen=True)
class Sandbox:
    """One tier on this machine.

    Attributes:
        name: ``"bubblewrap"``, ``"landlock"`` or ``"none"``.
        program: Path of bubblewrap; None in the other tiers.
        description: One line for the user.
    """

    name: str
    program: str | None
    description: str

    def run(
        self,
        code: str,
        entry_point: str,
        inputs: Sequence[bytes],
        limits: ResourceLimits,
        setup: str = "",
        names: Sequence[str] = (),
    ) -> SandboxRun:
        """Run code and call it on inputs; when this returns, all its processes have ended.

        Args:
            code: A whole program that defines ``entry_point``.
            entry_point: The function to call.
            inputs: The list of arguments of each call, as ``codec`` encodes it.
            limits: Resources that it may use.
            setup: Code that runs after it in the same namespace.
            names: Arguments that ``setup`` makes.
        """
        request = self._request(code, entry_point, limits, setup, names)
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as errors:
            file.write(b"\n".join([json.dumps(request).encode(), *inputs]))
            file.seek(0)
            started, namespace = self._start(file, errors)
            try:
                run = _collect(started, namespace, limits)
            finally:
                _end(started, namespace)
            if run.status == "died" and not run.lines:  # the sandbox failed before the answer ran
                errors.seek(0)
                message = errors.read().decode(errors="replace").strip().splitlines()
                run = SandboxRun("died", (), message[-1] if message else run.detail)
            return run

    def _request(
        self, code: str, entry_point: str, limits: ResourceLimits, setup: str, names: Sequence[str]
    ) -> process.Request:
        root = _is_root()
        return {
            "code": code.encode("utf-8", "replace").decode(),
            "entry_point": entry_point,
            "setup": setup,
            "names": list(names),
            "limits": list(limits.call_seconds),
            "memory": MEMORY,
            "cpu": limits.cpu_seconds,
            "count_processes": self.name == "bubblewrap" or (self.name == "landlock" and root),
            "user": _FIRST_USER + next(_users) % _USERS if root and self.name != "none" else None,
            "landlock": visible_files().allowed() if self.name == "landlock" else None,
            "filter": self.name != "none" and confinement.can_filter(),
            "packages": dict(visible_files().packages),
        }

    def _start(self, request: IO[bytes], errors: IO[bytes]) -> tuple[subprocess.Popen[bytes], Namespace | None]:
        visible = visible_files()
        command = [visible.interpreter, "-s", "-S", "-P", "-B", "-X", "utf8", *start_arguments(process.__name__)]
        read_end, write_end = os.pipe()
        if self.program:
            command = [*_bubblewrap(self.program, visible, write_end), *command]
        with os.fdopen(read_end, "rb") as information:
            try:
                started = subprocess.Popen(
                    command,
                    stdin=request,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=_ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                    pass_fds=[write_end] if self.program else [],
                )
            finally:
                os.close(write_end)
            text = information.read()
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            first = json.loads(text)["child-pid"] if text else None
            return started, Namespace(first, os.pidfd_open(first)) if first else None
        return started, None


def start_arguments(module: str) -> list[str]:
    """Return the arguments of an interpreter that runs the ``main`` of a module.

    The ``__init__`` files of the packages around the module neither run nor need to be readable: they import packages
    that an answer must not see.
    """
    names = itertools.accumulate(module.split(".")[:-1], "{}.{}".format)
    packages = {name: list(sys.modules[name].__path__) for name in names}
    return ["-c", _START.format(packages=packages, module=module)]


def _is_root() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0


def _bubblewrap(program: str, visible: VisibleFiles, info_descriptor: int) -> Iterator[str]:
    """Yield bubblewrap and its arguments: a read-only file system that is empty but for the visible files."""
    yield from (program, "--die-with-parent", "--new-session", "--info-fd", str(info_descriptor), "--cap-drop", "ALL")
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--hostname", "sandbox")
    if _is_root():  # the process becomes an ordinary user once it is inside
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield "--unshare-user"
    # bubblewrap would make the parents of a private folder private too, and the answer becomes another user
    above = {str(parent) for path in (*visible.roots, *visible.package_files) for parent in Path(path).parents}
    for path in sorted(above - {"/", *(link for link, _ in visible.links)}):
        yield from ("--dir", path)
    for path in visible.roots:
        yield from ("--ro-bind", path, path)
    for link, target in visible.links:
        yield from ("--symlink", target, link)
    for path in visible.hidden:
        yield from ("--tmpfs", path)
    for path in visible.package_files:
        yield from ("--ro-bind", path, path)
    for path in (*visible.hidden, "/"):
        yield from ("--dev-bind", os.devnull, os.devnull) if path == "/" else ()
        yield from ("--remount-ro", path)
    yield from ("--chdir", "/", "--")


def _collect(started: subprocess.Popen[bytes], namespace: Namespace | None, limits: ResourceLimits) -> SandboxRun:
    """Read lines until all are there, or the process ends, is idle for too long, or has written too much."""
    assert started.stdout is not None
    descriptor, received, lines = started.stdout.fileno(), bytearray(), 0
    clock = IdleClock(started.pid, namespace.first if namespace else None)
    idle_at_last_line = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while lines < len(limits.call_seconds):
            if not selector.select(1.0):
                idle = clock.seconds()
                too_long = idle - idle_at_last_line > MAX_IDLE or idle > MAX_IDLE_IN_TOTAL
                if too_long and not clock.is_runnable():
                    return SandboxRun("timeout", _whole_lines(received), "it was idle for too long")
                continue
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                break
            received += chunk
            if b"\n" in chunk:
                lines += chunk.count(b"\n")
                idle_at_last_line = clock.seconds()
            if len(received) > limits.output_bytes:
                return SandboxRun("output", (), f"it wrote more than {limits.output_bytes:,} bytes")
    if lines > len(limits.call_seconds):
        return SandboxRun("output", (), "it wrote more lines than it has inputs")
    if lines == len(limits.call_seconds):
        return SandboxRun("finished", _whole_lines(received), "")
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(MAX_IDLE)
    return _ended_run(started.returncode, _whole_lines(received))


def _whole_lines(received: bytearray) -> tuple[bytes, ...]:
    return tuple(bytes(received).split(b"\n")[:-1])


def _ended_run(code: int | None, lines: tuple[bytes, ...]) -> SandboxRun:
    """Return the result for an exit code; a signal is 128 + number from bubblewrap, and negative from Python."""
    if code == 0:
        return SandboxRun("finished", lines, "")
    if code is None:
        return SandboxRun("timeout", lines, "it closed its output and stayed")
    number = -code if code < 0 else code - 128
    if number in (signal.SIGPROF, signal.SIGXCPU):
        return SandboxRun("timeout", lines, "it used up its CPU time")
    known = number in {member.value for member in signal.Signals}
    return SandboxRun("died", lines, signal.Signals(number).name if known else f"exit code {code}")


def _end(started: subprocess.Popen[bytes], namespace: Namespace | None) -> None:
    """End all processes of a run, and wait until they are gone.

    With bubblewrap that is the whole namespace; with Landlock there is one process. Without a sandbox there may be
    more, and only those that stayed in their process group are ended.
    """
    if namespace is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(namespace.descriptor, signal.SIGKILL)
        gone = select.poll()
        gone.register(namespace.descriptor)
        gone.poll()  # bubblewrap itself does not wait for its namespace
        os.close(namespace.descriptor)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert started.stdout is not None
    started.stdout.close()


def available_sandboxes() -> Iterable[Sandbox]:
    """Yield the tiers that this machine might support, the strongest first."""
    if sys.platform != "linux":
        return
    program = shutil.which("bwrap")
    if program:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
        yield Sandbox("bubblewrap", program, f"bubblewrap {version[-1] if version else '?'}, seccomp, limits")
    user = "unprivileged user" if _is_root() else "the user's own account"
    yield Sandbox("landlock", None, f"Landlock, seccomp, limits, {user}")


UNSAFE = Sandbox("none", None, "NO SANDBOX: limits only; an answer can read, write and send what you can")
