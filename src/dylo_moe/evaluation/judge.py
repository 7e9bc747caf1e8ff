"""Judges answers on all cores, also while a model generates the next ones.

For each answer: a run in the sandbox, then a comparison in a process that ran none of it. Limits count processor
time, so other load does not change a verdict; an answer that hits one all the same has a second try with no other
answer beside it.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dylo_moe.core.embedded import cache_directory
from dylo_moe.evaluation.canary import choose_sandbox
from dylo_moe.evaluation.comparer import Comparer, Verdict
from dylo_moe.evaluation.preparation import Prepared, prepare
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import Sandbox

__all__ = ["Judge", "Verdict"]


@dataclass
class _Entry:
    """A problem that was asked for; holding it keeps its ``id`` its own."""

    problem: Problem
    lock: threading.Lock = field(default_factory=threading.Lock)
    prepared: Prepared | None = None


class Judge:
    """Gives verdicts. Use it as a context manager: it has threads and processes.

    Args:
        sandbox: Where answers run; by default the strongest that holds.
        workers: How many answers run at a time; by default one for each core.
        cache: Where expected outputs are kept; by default in the user's cache directory.

    Raises:
        EvaluationError: No sandbox was given and none holds.
    """

    def __init__(self, sandbox: Sandbox | None = None, workers: int | None = None, cache: Path | None = None) -> None:
        self._sandbox = sandbox or choose_sandbox().sandbox
        self._cache = cache or cache_directory() / "expected"
        count = workers or _cores()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="judge")
        self._turns = _Turns(count)
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._comparers: dict[int, Comparer] = {}

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what has not begun, waits for the rest, and ends all processes."""
        self._threads.shutdown(cancel_futures=True)
        for comparer in self._comparers.values():
            comparer.close()

    def submit(self, problem: Problem, code: str) -> "Future[Verdict]":
        """Judges an answer as soon as a core is free.

        Args:
            problem: The task.
            code: A whole program that defines ``problem.entry_point``; for HumanEval the prompt is part of it.
        """
        return self._threads.submit(self._judge, problem, code)

    def judge(self, problem: Problem, code: str) -> Verdict:
        """As ``submit``, waiting for the verdict.

        Raises:
            EvaluationError: The problem's own canonical solution fails.
        """
        return self.submit(problem, code).result()

    def judge_many(self, answers: Iterable[tuple[Problem, str]]) -> Iterator[Verdict]:
        """Verdicts on answers, in their order; each answer is begun as soon as the iterable gives it."""
        futures = [self.submit(problem, code) for problem, code in answers]
        for future in futures:
            yield future.result()

    def _judge(self, problem: Problem, code: str) -> Verdict:
        with self._lock:
            comparer = self._comparers.setdefault(threading.get_ident(), Comparer())
            entry = self._entries.setdefault(id(problem), _Entry(problem))
        with self._turns.shared():
            with entry.lock:
                entry.prepared = entry.prepared or prepare(problem, self._sandbox, comparer, self._cache)
            verdict = self._judge_once(problem, entry.prepared, comparer, code)
        if verdict.status == "timeout":
            with self._turns.alone():
                verdict = self._judge_once(problem, entry.prepared, comparer, code)
        return verdict

    def _judge_once(self, problem: Problem, prepared: Prepared, comparer: Comparer, code: str) -> Verdict:
        run = self._sandbox.run(
            code, problem.entry_point, prepared.inputs, prepared.allowance, problem.setup, prepared.names
        )
        if run.status == "finished":
            return comparer.compare(problem, prepared.inputs, prepared.expected, run.lines)
        return Verdict(False, "killed" if run.status == "died" else run.status, run.detail)


class _Turns:
    """Many take turns side by side, or one alone."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)
        self._waiting = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._free:
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        # one at a time gathers all the places: two that each held half would wait for ever
        with self._waiting:
            for _ in range(self._count):
                self._free.acquire()
            try:
                yield
            finally:
                self._free.release(self._count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
