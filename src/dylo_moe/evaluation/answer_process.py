"""The process that runs an answer: it is given code and inputs, never what the outputs should be.

Standard input holds one line of JSON, the ``Request``, and then one encoded input (a list of arguments) a line. The
process confines itself, runs the code, calls the answer once for each input, and writes one line for each to what
was its standard output: ``["ok", VALUE, SECONDS]``, VALUE as ``wire`` has it and SECONDS of processor time, or
``["raised", TEXT]``. A first line says that the code ran, ``["ready"]``, or that it did not, ``["failed", TEXT]``.

The answer can write those lines itself. It gains nothing: they hold outputs, which it would have to know.
Imports the standard library only, and of this package what does too.
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
from typing import Any, TypedDict

from dylo_moe.evaluation import confine, wire


class Request(TypedDict):
    """What to run and what to give up first."""

    code: str
    entry_point: str
    setup: str
    """Code that makes arguments out of the answer's own classes, run after it."""
    names: list[str]
    """The arguments that ``setup`` makes."""
    limits: list[float]
    """Seconds of processor time for the code, and for each call."""
    memory: int
    cpu: int
    count_processes: bool
    user: int | None
    landlock: list[str] | None
    filter: bool
    packages: dict[str, str]
    """Folders of the packages that answers may import."""


class Packages:
    """Finds some packages where they are, in folders whose other contents cannot be read."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """As ``importlib`` asks a finder."""
        folder = self._folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def main() -> None:
    """Serves one request and ends."""
    request: Request = json.loads(sys.stdin.buffer.readline())
    inputs = sys.stdin.buffer.read().splitlines()
    channel = os.fdopen(os.dup(1), "w", buffering=1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    confine_as(request)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    sys.meta_path.append(Packages(request["packages"]))

    def send(*line: Any) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    answer(request, inputs, send)
    os._exit(0)


def confine_as(request: Request) -> None:
    """Gives up everything that the request says; in this order, as each step may forbid the ones before it."""
    if request["landlock"] is not None:
        confine.landlock(request["landlock"])
    if request["user"] is not None:
        confine.become(request["user"], resource.__file__ or os.__file__)
    if sys.platform == "linux":
        confine.die_with_parent()
    confine.limit(request["memory"], request["cpu"], request["count_processes"])
    if request["filter"]:
        confine.filter_system_calls()


def answer(request: Request, inputs: Sequence[bytes], send: Callable[..., None]) -> None:
    """Runs the code and calls it on each input, until a call raises."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses and pickle look a class's module up
    names: dict[str, Any] = {}
    signal.setitimer(signal.ITIMER_PROF, request["limits"][0])
    try:
        exec(compile(request["code"], "<answer>", "exec"), module.__dict__)
        function = module.__dict__[request["entry_point"]]
        exec(request["setup"], module.__dict__)
        names.update((name, module.__dict__[name]) for name in request["names"])
    except BaseException as error:
        send("failed", describe(error))
        return
    send("ready")
    for line, limit in zip(inputs, request["limits"][1:], strict=True):
        arguments = wire.decode(line, names)
        # the signal's default ends the process: a loop that swallows exceptions cannot swallow that
        signal.setitimer(signal.ITIMER_PROF, limit)
        start = time.process_time()
        try:
            encoded = json.loads(wire.encode(function(*arguments)))
        except BaseException as error:
            send("raised", describe(error))
            return
        send("ok", encoded, time.process_time() - start)


def describe(error: BaseException) -> str:
    """The type and, if it is plain text, the message; none of the error's own methods."""
    text = error.args[0] if error.args and type(error.args[0]) is str else ""
    return f"{type(error).__name__}: {text}"[:200]
