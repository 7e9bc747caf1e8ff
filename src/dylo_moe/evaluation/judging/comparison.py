"""The process that compares outputs, and its handle: it knows the expected ones and runs no part of an answer.

Each thread of a ``Judge`` has one, so that a large comparison holds up neither the others nor a model that generates,
and an output made to be compared forever costs only a restart.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Literal

from dylo_moe.evaluation.candidate import codec
from dylo_moe.evaluation.judging import checker
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import start_arguments

PATIENCE = 60.0
"""Seconds of CPU time for one comparison: honest ones take milliseconds."""

Status = Literal["passed", "wrong", "error", "timeout", "killed", "output"]
_Calls = tuple[list[str], list[str]]
"""Recorded calls, as ``checker.record_calls`` returns them."""


@dataclass(frozen=True)
class Verdict:
    """Judgment of one answer.

    Attributes:
        passed: Whether it solved the task.
        status: ``wrong`` gave a wrong output; ``error`` raised, does not define the function, or wrote something that
            is not an output; ``timeout`` took too long; ``killed`` was ended by a limit or a crash; ``output`` wrote
            too much.
        detail: For a person: which input, or which error. Untrusted text, of printable characters only.
    """

    passed: bool
    status: Status
    detail: str = ""


class ComparisonWorker:
    """Handle of a comparing process, which is started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[object, Verdict | _Calls] | None = None

    def record(self, problem: Problem) -> _Calls:
        """Return the result of ``checker.record_calls``, run in the process."""
        found = self._ask("record", problem)
        assert isinstance(found, tuple)
        return found

    def compare(
        self, problem: Problem, inputs: Sequence[bytes], expected: Sequence[bytes], lines: Sequence[bytes]
    ) -> Verdict:
        """Return the verdict of ``compare_outputs``, run in the process."""
        found = self._ask("compare", problem, inputs, expected, lines)
        assert isinstance(found, Verdict)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _ask(self, operation: Literal["record", "compare"], problem: Problem, *arguments: object) -> Verdict | _Calls:
        connection = self._connection or self._start()
        connection.send((PATIENCE, operation, problem, *arguments))
        try:
            return connection.recv()
        except EOFError as error:
            assert self._process is not None
            code = self._process.wait()
            self.close()
            if code != -signal.SIGPROF:
                raise RuntimeError(f"{problem.task_id}: the comparing process failed, see above") from error
        if operation == "record":
            raise RuntimeError(f"{problem.task_id}: its test does not end on the canonical solution")
        return Verdict(False, "output", f"comparing its outputs takes more than {PATIENCE} s")

    def _start(self) -> "Connection[object, Verdict | _Calls]":
        own, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, *start_arguments(__name__), str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )
        self._connection = own
        return own


def main() -> None:
    """Serve the requests of a ``ComparisonWorker`` until it closes the connection."""
    sys.set_int_max_str_digits(0)
    with Connection(int(sys.argv[1])) as connection:
        while True:
            try:
                patience, operation, *arguments = connection.recv()
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_PROF, patience)  # ends this process; its handle sees which signal it was
            compute = checker.record_calls if operation == "record" else compare_outputs
            connection.send(compute(*arguments))


def compare_outputs(
    problem: Problem, inputs: Sequence[bytes], expected: Sequence[bytes], lines: Sequence[bytes]
) -> Verdict:
    """Return the verdict on the lines that an answer's process wrote.

    Args:
        problem: The task.
        inputs: The list of arguments of each call, encoded.
        expected: The lines that the canonical solution's process wrote for these inputs; unused if a test decides.
        lines: The lines of the answer's process.
    """
    try:
        parsed = [codec.decode_line(line) for line in lines]
    except ValueError:
        return Verdict(False, "error", "it wrote to the channel of its outputs")
    words = [word for word, _ in parsed]
    if words and words[-1] in ("failed", "raised"):
        where = "running the code" if words[-1] == "failed" else f"input {len(words) - 2}"
        message = "".join(character if character.isprintable() else "�" for character in str(parsed[-1][1]))
        return Verdict(False, "error", f"{where}: {message}")
    if words != ["ready", *["ok"] * len(inputs)]:
        return Verdict(False, "error", "it ended before its last output")
    outputs = [value for _, value in parsed[1:]]
    if problem.test:
        right = checker.passes_test(problem, [line.decode() for line in inputs], outputs)
        return Verdict(True, "passed") if right else Verdict(False, "wrong", "its test fails")
    wanted = [codec.decode_line(line)[1] for line in expected]
    wrong = checker.first_wrong(problem, [codec.decode(line) for line in inputs], wanted, outputs)
    return Verdict(True, "passed") if wrong is None else Verdict(False, "wrong", f"input {wrong}")
