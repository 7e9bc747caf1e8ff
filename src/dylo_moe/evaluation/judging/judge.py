"""Judges answers on all cores, also while a model generates the next ones.

Each answer runs in the sandbox, then its outputs are compared in a process that runs no part of it. Limits count CPU
time, so that other load does not change a verdict; an answer that still exceeds one is tried a second time, alone.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dylo_moe.core import cache_directory
from dylo_moe.evaluation.judging.comparison import ComparisonWorker, Verdict
from dylo_moe.evaluation.judging.expected_outputs import ReferenceRun, run_reference
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox import Sandbox, choose_sandbox

__all__ = ["Judge", "Verdict"]


@dataclass
class _Entry:
    """A problem with a submitted answer; the reference keeps its ``id`` from being reused."""

    problem: Problem
    lock: threading.Lock = field(default_factory=threading.Lock)
    reference: ReferenceRun | None = None


class Judge:
    """Judge of answers. Use it as a context manager: it has threads and processes.

    Args:
        sandbox: Sandbox in which answers run; by default the strongest that holds.
        workers: Number of answers that run at the same time; by default one for each core.
        cache: Folder of expected outputs; by default in the user's cache directory.

    Raises:
        EvaluationError: No sandbox was given and none holds.
    """

    def __init__(self, sandbox: Sandbox | None = None, workers: int | None = None, cache: Path | None = None) -> None:
        self._sandbox = sandbox or choose_sandbox().sandbox
        self._cache = cache or cache_directory() / "expected"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = workers or cores
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="judge")
        self._turns = _SharedExclusiveLock(count)
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._workers: dict[int, ComparisonWorker] = {}

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not started, wait for the rest, and end all processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.close()

    def submit(self, problem: Problem, code: str) -> "Future[Verdict]":
        """Judge an answer as soon as a core is free.

        Args:
            problem: The task.
            code: A whole program that defines ``problem.entry_point``; for HumanEval that includes the prompt.
        """
        return self._threads.submit(self._judge, problem, code)

    def judge(self, problem: Problem, code: str) -> Verdict:
        """Judge an answer and wait for the verdict.

        Args:
            problem: The task.
            code: A whole program that defines ``problem.entry_point``.

        Raises:
            EvaluationError: The problem's own canonical solution fails.
        """
        return self.submit(problem, code).result()

    def judge_many(self, answers: Iterable[tuple[Problem, str]]) -> Iterator[Verdict]:
        """Yield the verdicts on answers, in their order; each answer is submitted as soon as the iterable yields it."""
        futures = [self.submit(problem, code) for problem, code in answers]
        for future in futures:
            yield future.result()

    def _judge(self, problem: Problem, code: str) -> Verdict:
        with self._lock:
            worker = self._workers.setdefault(threading.get_ident(), ComparisonWorker())
            entry = self._entries.setdefault(id(problem), _Entry(problem))
        with self._turns.shared():
            with entry.lock:
                entry.reference = entry.reference or run_reference(problem, self._sandbox, worker, self._cache)
            verdict = self._judge_once(problem, entry.reference, worker, code)
        if verdict.status == "timeout":
            with self._turns.exclusive():
                verdict = self._judge_once(problem, entry.reference, worker, code)
        return verdict

    def _judge_once(self, problem: Problem, reference: ReferenceRun, worker: ComparisonWorker, code: str) -> Verdict:
        run = self._sandbox.run(
            code, problem.entry_point, reference.inputs, reference.limits, problem.setup, reference.names
        )
        if run.status == "finished":
            return worker.compare(problem, reference.inputs, reference.expected, run.lines)
        return Verdict(False, "killed" if run.status == "died" else run.status, run.detail)


class _SharedExclusiveLock:
    """Lock that up to ``count`` threads share, or one holds alone."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)
        self._waiting = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._free:
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        # one thread at a time: two that each hold half of the permits would wait forever
        with self._waiting:
            for _ in range(self._count):
                self._free.acquire()
            try:
                yield
            finally:
                self._free.release(self._count)
