"""The process that runs an answer. It is given code and inputs, never the expected outputs.

Standard input holds one line of JSON, the ``Request``, and then one encoded list of arguments a line. The process
confines itself, runs the code, calls the answer once for each input, and writes one line for each to its original
standard output: ``["ok", VALUE, SECONDS]``, with VALUE as ``codec`` encodes it and SECONDS of CPU time, or
``["raised", TEXT]``. The first line reports whether the code ran: ``["ready"]`` or ``["failed", TEXT]``.

The answer can write such lines itself. It gains nothing: they hold outputs, which it would have to know.
"""

import importlib.util
import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import TypedDict

from dylo_moe.evaluation.candidate import codec, confinement


class Request(TypedDict):
    """What to run, and how to confine the process first."""

    code: str
    entry_point: str
    setup: str
    """Code that runs after ``code`` and makes arguments of the answer's own classes."""
    names: list[str]
    """Names of the arguments that ``setup`` makes."""
    limits: list[float]
    """Seconds of CPU time for the code, and for each call."""
    memory: int
    """Bytes of address space."""
    cpu: int
    """Seconds of CPU time in total."""
    count_processes: bool
    user: int | None
    """Number of the user to become; None to stay the same."""
    landlock: list[str] | None
    """Paths that stay readable; None for no Landlock."""
    filter: bool
    """Whether to filter system calls."""
    packages: dict[str, str]
    """Folder of each package that answers may import."""


class PackageFinder:
    """Import hook for packages in folders whose parents cannot be read."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of one of the packages, as ``importlib`` expects of a finder."""
        folder = self._folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def main() -> None:
    """Serve one request, then end the process."""
    request: Request = json.loads(sys.stdin.buffer.readline())
    inputs = sys.stdin.buffer.read().splitlines()
    channel = os.fdopen(os.dup(1), "w", buffering=1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    confine_process(request)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    sys.meta_path.append(PackageFinder(request["packages"]))

    def send(*line: object) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    run_answer(request, inputs, send)
    os._exit(0)


def confine_process(request: Request) -> None:
    """Apply the limits of a request to this process. The order matters: each step may forbid the ones before it."""
    if request["landlock"] is not None:
        confinement.restrict_files(request["landlock"])
    if request["user"] is not None:
        confinement.become_user(request["user"], resource.__file__ or os.__file__)
    if sys.platform == "linux":
        confinement.die_with_parent()
    confinement.set_limits(request["memory"], request["cpu"], request["count_processes"])
    if request["filter"]:
        confinement.filter_system_calls()


def run_answer(request: Request, inputs: Sequence[bytes], send: Callable[..., None]) -> None:
    """Run the code and call it on each input, until a call raises."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses and pickle look up a class's module
    names: dict[str, object] = {}
    signal.setitimer(signal.ITIMER_PROF, request["limits"][0])
    try:
        exec(compile(request["code"], "<answer>", "exec"), module.__dict__)
        function = module.__dict__[request["entry_point"]]
        exec(request["setup"], module.__dict__)
        names.update((name, module.__dict__[name]) for name in request["names"])
    except BaseException as error:
        send("failed", describe_error(error))
        return
    send("ready")
    for line, limit in zip(inputs, request["limits"][1:], strict=True):
        arguments = codec.decode(line, names)
        # the signal's default action ends the process, even in a loop that swallows all exceptions
        signal.setitimer(signal.ITIMER_PROF, limit)
        start = time.process_time()
        try:
            encoded = json.loads(codec.encode(function(*arguments)))
        except BaseException as error:
            send("raised", describe_error(error))
            return
        send("ok", encoded, time.process_time() - start)


def describe_error(error: BaseException) -> str:
    """Return the type and the message, if that is a plain string, without calling any method of the error."""
    text = error.args[0] if error.args and type(error.args[0]) is str else ""
    return f"{type(error).__name__}: {text}"[:200]
