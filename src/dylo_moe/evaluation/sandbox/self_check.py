"""Tests a sandbox before it is trusted: a program in it attempts what no answer may do, and reports what succeeded.

It gets a real file to read, a real folder to write to, a real port that listens and a real environment variable, so
that a sandbox that only seems to work is found.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.errors import EvaluationError
from dylo_moe.evaluation.candidate import codec
from dylo_moe.evaluation.sandbox.runner import UNSAFE, ResourceLimits, Sandbox, available_sandboxes

_TOKEN = "DYLO_MOE_CANARY"

_PROBE = '''
import os
import socket

def attempt(action):
    try:
        action()
    except Exception:
        return False
    return True

def read(path):
    with open(path) as file:
        file.read()

def write(path):
    with open(path, "w") as file:
        file.write("canary")

def connect(port):
    socket.create_connection(("127.0.0.1", port), 1).close()

def look(token):
    os.environ[token]

def fork():
    if os.fork() == 0:
        os._exit(0)

def probe(secret, folder, port, token, judge):
    """Return which attempts succeeded; the last shows that the probe itself works."""
    return {
        "read a private file": attempt(lambda: read(secret)),
        "read /etc/passwd": attempt(lambda: read("/etc/passwd")),
        "write a file": attempt(lambda: write(os.path.join(folder, "written"))),
        "write to /tmp": attempt(lambda: write("/tmp/dylo-moe-canary")),
        "reach the network": attempt(lambda: connect(port)),
        "read the environment": attempt(lambda: look(token)),
        "start a process": attempt(fork),
        "reach the judge": attempt(lambda: os.kill(judge, 0)) and judge != os.getpid(),
        "run at all": attempt(lambda: None),
    }
'''


@dataclass(frozen=True)
class SandboxChoice:
    """The sandbox to use.

    Attributes:
        sandbox: The strongest tier that holds.
        refused: For each stronger tier, its name and why it does not hold.
    """

    sandbox: Sandbox
    refused: tuple[str, ...]

    def describe(self) -> str:
        """Return one line for the user."""
        return "; ".join([f"sandbox: {self.sandbox.description}", *(f"not {reason}" for reason in self.refused)])


def choose_sandbox(unsafe: bool = False) -> SandboxChoice:
    """Return the strongest tier that holds.

    Args:
        unsafe: Whether to go without a sandbox if no tier holds.

    Raises:
        EvaluationError: No tier holds, and ``unsafe`` is false.
    """
    refused: list[str] = []
    for sandbox in available_sandboxes():
        leaks = find_leaks(sandbox)
        if not leaks:
            return SandboxChoice(sandbox, tuple(refused))
        refused.append(f"{sandbox.name}: {', '.join(leaks)}")
    if unsafe:
        return SandboxChoice(UNSAFE, tuple(refused))
    raise EvaluationError(
        f"no sandbox holds on this machine ({'; '.join(refused) or 'it is not Linux'}); install bubblewrap, or set "
        "`unsafe_no_sandbox` on a machine that you can afford to lose"
    )


def find_leaks(sandbox: Sandbox) -> list[str]:
    """Return what the canary could do and must not, or why it could not run; empty if the sandbox holds."""
    with _bait() as arguments:
        limits = ResourceLimits(call_seconds=(5.0, 5.0), cpu_seconds=10, output_bytes=1 << 16)
        try:
            run = sandbox.run(_PROBE, "probe", [codec.encode(arguments).encode()], limits)
        except OSError as error:
            return [f"it cannot be started ({error})"]
    found: object = None
    if run.status == "finished" and len(run.lines) == 2:
        _, found = codec.decode_line(run.lines[1])
    if not isinstance(found, dict) or found.get("run at all") is not True:
        return [f"the canary did not run ({run.detail or 'it answered nothing'})"]
    return [f"the canary could {name}" for name, done in found.items() if done and name != "run at all"]


@contextmanager
def _bait() -> Iterator[list[object]]:
    """Make what the probe must not reach, and yield the probe's arguments."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        for path, mode in ((Path(folder), 0o777), (secret, 0o666)):
            path.chmod(mode)  # the sandbox must refuse it, not the file's permissions
        before = os.environ.get(_TOKEN)
        os.environ[_TOKEN] = "secret"
        try:
            yield [str(secret), folder, server.getsockname()[1], _TOKEN, os.getpid()]
        finally:
            if before is None:
                del os.environ[_TOKEN]
            else:
                os.environ[_TOKEN] = before
