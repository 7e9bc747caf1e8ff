"""Stopping in good order: a signal ends training after the step that runs, with a checkpoint.

Clouds announce that they take a machine back with SIGTERM, people press Ctrl-C. The first signal lets the step end,
saves and leaves; a second one stops at once. A run that was stopped exits with ``errors.EXIT_STOPPED``: the one code
that means "start me again with --resume_from_checkpoint".
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EvaluationInterrupted(Exception):
    """An evaluation was given up; training saves and ends. Never leaves the trainer."""


class StopRequest:
    """Whether somebody asked this process to stop.

    Attributes:
        signal: The first signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT for requests to stop, for a block of code; a second one ends the process."""
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
        sys.stderr.write(f"\n{self.signal.name}: saving after this step, then ending; once more ends at once\n")


class InterruptionCallback(TrainerCallback):
    """Saves and ends training where it was asked to, and saves in between by the clock.

    Several processes get a signal at different steps, and their clocks differ: what they do is agreed upon.

    Args:
        request: Tells whether to stop.
        accelerator: The Trainer's.
        save_minutes: Minutes from one checkpoint to the next; None for no clock.
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = self._clock()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.save_minutes is not None and self._clock() - self._saved >= 60 * self.save_minutes
        stop, save = self._agreed(self.request.signal is not None, due)
        if stop or save:
            control.should_save = True
        if stop:
            self._stopping = True
            control.should_evaluate = False
            control.should_training_stop = True

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the step's own end has saved, and evaluating is for a run that has the time; as agreed, and not as heard:
        # a process that heard nothing would evaluate alone
        if self._stopping:
            control.should_evaluate = control.should_save = False

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = self._clock()

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        (stop,) = self._agreed(self.request.signal is not None)
        if stop:
            self._stopping = True
            raise EvaluationInterrupted

    def _agreed(self, *wishes: bool) -> list[bool]:
        """Each wish, true where any process has it."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        wished = torch.tensor([float(wish) for wish in wishes], device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(wished, "sum").tolist()]
