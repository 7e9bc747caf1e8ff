"""The process that compares: it knows what is right and runs none of an answer; and the handle to it.

One for each thread of a ``Judge``, so that a large comparison holds up neither the others nor a model that generates,
and that an output made to be compared for ever costs no more than a restart.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Literal

from dylo_moe.evaluation import oracle, wire
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import START

PATIENCE = 60.0
"""Seconds of processor time for one comparison: honest ones take milliseconds."""

Status = Literal["passed", "wrong", "error", "timeout", "killed", "output"]


@dataclass(frozen=True)
class Verdict:
    """What became of an answer.

    Attributes:
        passed: Whether it solved the task.
        status: ``wrong`` gave a wrong output; ``error`` raised, defines no such function, or wrote what is no output;
            ``timeout`` took too long; ``killed`` was ended by a limit or a crash; ``output`` wrote too much.
        detail: For a person: which input, or which error. Untrusted text, of printable characters only.
    """

    passed: bool
    status: Status
    detail: str = ""


class Comparer:
    """A comparing process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    def record(self, problem: Problem) -> tuple[list[str], list[str]]:
        """As ``oracle.record``."""
        found: tuple[list[str], list[str]] = self._ask("record", problem)
        return found

    def compare(
        self, problem: Problem, inputs: Sequence[bytes], expected: Sequence[bytes], lines: Sequence[bytes]
    ) -> Verdict:
        """The verdict on the lines that an answer's process wrote, all encoded."""
        found: Verdict = self._ask("compare", problem, inputs, expected, lines)
        return found

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _ask(self, *request: Any) -> Any:
        connection = self._connection or self._start()
        connection.send((PATIENCE, *request))
        try:
            return connection.recv()
        except EOFError as error:
            assert self._process is not None
            code = self._process.wait()
            self.close()
            if code != -signal.SIGPROF:
                raise RuntimeError(f"{request[1].task_id}: the comparing process failed, see above") from error
        if request[0] == "record":
            raise RuntimeError(f"{request[1].task_id}: its test does not end on the canonical solution")
        return Verdict(False, "output", f"comparing its outputs takes more than {PATIENCE} s")

    def _start(self) -> "Connection[Any, Any]":
        own, other = Pipe()
        package = str(Path(__file__).parents[1])
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START.format(module="comparer"), package, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )
        self._connection = own
        return own


def main() -> None:
    """Serves a ``Comparer`` until it goes."""
    sys.set_int_max_str_digits(0)
    with Connection(int(sys.argv[2])) as connection:
        while True:
            try:
                patience, operation, *arguments = connection.recv()
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_PROF, patience)  # ends the process; the one that asked sees why
            connection.send(oracle.record(*arguments) if operation == "record" else compare(*arguments))


def compare(problem: Problem, inputs: Sequence[bytes], expected: Sequence[bytes], lines: Sequence[bytes]) -> Verdict:
    """As ``Comparer.compare``, in this process."""
    try:
        said = [wire.decode_line(line) for line in lines]
    except ValueError:
        return Verdict(False, "error", "it wrote to the channel of its outputs")
    words = [word for word, _ in said]
    if words and words[-1] in ("failed", "raised"):
        where = "running the code" if words[-1] == "failed" else f"input {len(words) - 2}"
        return Verdict(False, "error", f"{where}: {_printable(said[-1][1])}")
    if words != ["ready", *["ok"] * len(inputs)]:
        return Verdict(False, "error", "it ended before its last output")
    outputs = [value for _, value in said[1:]]
    if problem.test:
        right = oracle.test_passes(problem, [line.decode() for line in inputs], outputs)
        return Verdict(True, "passed") if right else Verdict(False, "wrong", "its test fails")
    wanted = [wire.decode_line(line)[1] for line in expected]
    wrong = oracle.first_wrong(problem, [wire.decode(line) for line in inputs], wanted, outputs)
    return Verdict(True, "passed") if wrong is None else Verdict(False, "wrong", f"input {wrong}")


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in text)
