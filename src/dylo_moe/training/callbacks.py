"""Callbacks that show progress, and evaluate the base model first."""

import time
from collections.abc import Callable
from contextlib import suppress

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from typing_extensions import override

from dylo_moe.training.checkpointing import EvaluationInterrupted


class TokenProgressCallback(ProgressCallback):
    """The Trainer's progress bars, which also show loss and real tokens per second."""

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        open_bar: Callable[..., None] = super().on_train_begin
        open_bar(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")
        self._started, self._tokens_before = time.monotonic(), state.num_input_tokens_seen
        self._shown: dict[str, str] = {}

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        advance_bar: Callable[..., None] = super().on_step_end
        advance_bar(args, state, control, **kwargs)
        rate = (state.num_input_tokens_seen - self._tokens_before) / (time.monotonic() - self._started)
        self._show({"tokens/s": f"{rate:.0f}"})

    @override
    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        advance_bar: Callable[..., None] = super().on_prediction_step
        advance_bar(args, state, control, eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Evaluating", refresh=False)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        # the Trainer's own callback would write a line for each entry
        logs = logs or {}
        names = {"loss": "loss", "eval_mean_domain_loss": "held-out loss"}
        self._show({title: f"{logs[key]:.3f}" for key, title in names.items() if key in logs})

    def close(self) -> None:
        """Close the bars where they are, so that later output starts on a new line."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def _show(self, values: dict[str, str]) -> None:
        if self.training_bar is not None:
            self._shown.update(values)
            self.training_bar.set_postfix(self._shown)


class BaseEvaluation(TrainerCallback):
    """Callback that evaluates the base model alone, after the Trainer has prepared the model and before the first step.

    Not earlier: accelerate would take a model that it has only evaluated as prepared, and several processes would then
    train separate models; and a model has to be sharded before it can be evaluated with FSDP.

    Args:
        evaluate: Function that evaluates the base model and returns its metrics.

    Attributes:
        metrics: Metrics of the base model; empty until they are known.
        ended: Time at which the evaluation ended, by ``time.monotonic``.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]]) -> None:
        self._evaluate = evaluate
        self.metrics: dict[str, float] = {}
        self.ended = time.monotonic()

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        with suppress(EvaluationInterrupted):  # training itself then ends after the first step
            self.metrics = self._evaluate()
        self.ended = time.monotonic()
