"""What the Trainer shows while it runs."""

import time
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from typing_extensions import override


class TokenProgressCallback(ProgressCallback):
    """The Trainer's progress bars, with loss and real tokens per second beside the steps."""

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description("Training")
        self._started, self._tokens_before = time.monotonic(), state.num_input_tokens_seen
        self._shown: dict[str, str] = {}

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        rate = (state.num_input_tokens_seen - self._tokens_before) / (time.monotonic() - self._started)
        self._show({"tokens/s": f"{rate:.0f}"})

    @override
    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Evaluating", refresh=False)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # in the bar, where the Trainer's own callback would write a line for each entry
        logs = logs or {}
        names = {"loss": "loss", "eval_mean_domain_loss": "held-out loss"}
        self._show({title: f"{logs[key]:.3f}" for key, title in names.items() if key in logs})

    def _show(self, values: dict[str, str]) -> None:
        if self.training_bar is not None:
            self._shown.update(values)
            self.training_bar.set_postfix(self._shown)
