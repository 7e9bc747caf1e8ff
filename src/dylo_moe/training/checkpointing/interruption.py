"""Graceful interruption: a signal ends training after the current step, with a checkpoint.

Clouds announce with SIGTERM that they take a machine back; people press Ctrl-C. The first signal lets the step end,
saves and stops; a second one stops at once. An interrupted run exits with ``errors.EXIT_STOPPED``, the one exit code
that means "start me again with --resume_from_checkpoint".
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EvaluationInterrupted(Exception):
    """Interruption of an evaluation; training saves and ends. Never leaves the trainer."""


class StopRequest:
    """Request to stop this process, made by a signal.

    Attributes:
        signal: The first signal that arrived; None before that.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests to stop during the block; a second signal ends the process."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
        sys.stderr.write(f"\n{self.signal.name}: saving after this step, then stopping; a second one stops at once\n")


class InterruptionCallback(TrainerCallback):
    """Callback that saves and ends training on request, and saves at intervals of time.

    Processes get a signal at different steps and their clocks differ, so they agree on what to do at each step.

    Args:
        request: Request to stop, set by a signal.
        accelerator: The Trainer's accelerator.
        save_minutes: Minutes between checkpoints; None to save at no interval.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        request: StopRequest,
        accelerator: Accelerator,
        save_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.accelerator = accelerator
        self.save_minutes = save_minutes
        self._clock = clock
        self._saved = clock()
        self._stopping = False

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._saved = self._clock()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        due = self.save_minutes is not None and self._clock() - self._saved >= 60 * self.save_minutes
        stop, save = self._any_process(self.request.signal is not None, due)
        if stop or save:
            control.should_save = True
        if stop:
            self._stopping = True
            control.should_evaluate = False
            control.should_training_stop = True

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # on_step_end saved already; use the agreed flag: a rank that got no signal would evaluate alone and hang
        if self._stopping:
            control.should_evaluate = control.should_save = False

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._saved = self._clock()

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        (stop,) = self._any_process(self.request.signal is not None)
        if stop:
            self._stopping = True
            raise EvaluationInterrupted

    def _any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process; every process has to call this."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(values, "sum").tolist()]
