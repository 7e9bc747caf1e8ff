"""The part of the Trainer that saves, goes on, and is stopped: nothing that was saved is lost, or taken for another.

Covered: whole checkpoints in the project's own format, of one process or of several that hold parts of the model; runs
that go on as if they had never been stopped. What is trained, and how, is in ``trainer``.
"""

import json
import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.errors import CheckpointError, first_line
from dylo_moe.training import checkpoints
from dylo_moe.training.interruption import EvaluationInterrupted
from dylo_moe.training.processes import taking_whole_tensors, whole_tensors

_LOG = logging.getLogger(__name__)

DATA_FILE = "data.json"
"""In a checkpoint: what it was trained on."""


class ResumableTrainer(Trainer):
    """A Trainer of a ``DyLoRA_MoE`` with checkpoints that are whole or not there.

    Args:
        data_identity: Tells the training data and its order from others; a checkpoint is resumed on the same only.
        save_in_place: Rename no folder, as object storage cannot.
        **kwargs: As for ``transformers.Trainer``.
    """

    model: DyLoRA_MoE

    def __init__(self, data_identity: str = "", save_in_place: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_identity = data_identity
        self.save_in_place = save_in_place
        self.add_callback(_EvaluateIfDue(self))

    @override
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; the random numbers of training are the same with and without it."""
        with self._own_random_numbers():
            return super().evaluate(*args, **kwargs)

    def evaluate_apart(self, prefix: str) -> dict[str, float]:
        """Metrics on the held-out rows, named ``<prefix>_<metric>``; training, its log and its patience ignore them."""
        with self._own_random_numbers():
            return self.predict(self.eval_dataset, metric_key_prefix=prefix).metrics or {}  # type: ignore[arg-type]

    def _own_random_numbers(self) -> AbstractContextManager[Any]:
        devices = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        return torch.random.fork_rng(devices=devices)

    @override
    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    @override
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not metrics:  # the evaluation was given up, and is done when the run goes on
            return False
        best: bool = super()._determine_best_metric(metrics, trial)
        if best:
            folder = checkpoints.folder_of(Path(self._get_output_dir(trial)), self.state.global_step)
            self.state.best_model_checkpoint = str(folder)
        return best

    def evaluate_if_due(self) -> None:
        """Makes up for an evaluation that an interruption has cut off or come before."""
        step = self.state.global_step
        done = any("eval_loss" in entry for entry in self.state.log_history if entry.get("step") == step)
        if step and not done and self._ends_a_stretch():
            self._determine_best_metric(self._evaluate(None, None), None)

    def _ends_a_stretch(self) -> bool:
        """Whether the step that was taken last is one after which the Trainer evaluates."""
        step, epoch = self.state.global_step, self.state.epoch or 0.0
        if self.args.eval_strategy == IntervalStrategy.STEPS:
            return step % self.state.eval_steps == 0
        return self.args.eval_strategy == IntervalStrategy.EPOCH and (epoch == int(epoch) or self._is_finished())

    @override
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which takes one step too many where a run that has taken all of them is resumed."""
        if self._is_finished():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _is_finished(self) -> bool:
        """Whether all steps are done, or a resumed run had been stopped early before it could say so."""
        patience = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in patience)
        return stopped or self.state.global_step >= self.state.max_steps

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, which is one once all of it is on the disk."""
        folder = checkpoints.folder_of(Path(self._get_output_dir(trial)), self.state.global_step)
        place = checkpoints.place_of(folder, in_place=self.save_in_place)
        try:
            if self.args.should_save:
                checkpoints.begin(folder, in_place=self.save_in_place)
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(place)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.finish(folder, in_place=self.save_in_place)
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder.parent, self.args.save_total_limit, Path(best) if best else None)
        except (OSError, RuntimeError, CheckpointError) as error:
            # torch reports a full disk as a RuntimeError
            free = shutil.disk_usage(folder.parent).free / 2**20
            checkpoints.abandon(folder, in_place=self.save_in_place)
            raise CheckpointError(
                f"cannot write {folder}, with {free:.1f} MiB free: {first_line(error)}; free space or choose another "
                "--output_dir, then go on with --resume_from_checkpoint; earlier checkpoints are intact"
            ) from error

    def _write_checkpoint(self, folder: Path) -> None:
        """The files of a checkpoint, as the Trainer's own method writes them."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            stateful = [
                one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)
            ]
            self.state.stateful_callbacks = {type(one).__name__: one.state() for one in stateful}  # type: ignore[assignment]
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            (folder / DATA_FILE).write_text(json.dumps({"data": self.data_identity}) + "\n")

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the mixture, once; processes that hold parts of it give them to the one that writes."""
        state = whole_tensors(self.model, ("lora_", "router.")) if self.is_fsdp_enabled else None
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if _internal_call:  # a part of a checkpoint, which is made whole as one
            self.model.write_files(folder, state)
        else:
            self.model.save_pretrained(folder, state_dict=state, in_place=self.save_in_place)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # the Trainer would also write the whole base model, which never changes, into each checkpoint
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.check(folder)
        theirs = json.loads((folder / DATA_FILE).read_text())["data"]
        if theirs != self.data_identity:
            raise CheckpointError(
                f"the checkpoint {folder} was trained on other data, or in another order, than this run has; give the "
                "--datasets, --seed, batch size and other data flags of the run that wrote it"
            )
        with taking_whole_tensors():
            self.model.load_weights(folder)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch's word for other groups of parameters
            raise CheckpointError(
                f"the optimiser of the checkpoint {checkpoint} is not this run's ({first_line(error)}); give the "
                "--optim, --weight_decay and --router_learning_rate of the run that wrote it"
            ) from error

    @override
    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the Trainer's; the best checkpoint so far is found by its step, wherever the folder of the run is now."""
        progress: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = checkpoints.folder_of(Path(self._get_output_dir(None)), self.state.best_global_step)
            self.state.best_model_checkpoint = str(best) if checkpoints.problem(best) is None else None
            if self.state.best_model_checkpoint is None:
                _LOG.warning("%s, the best so far, is gone: the best is chosen among the checkpoints to come", best)
                self.state.best_metric = self.state.best_global_step = None
        return progress

    @override
    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        checkpoints.check(Path(self.state.best_model_checkpoint))
        with taking_whole_tensors():
            self.model.load_weights(self.state.best_model_checkpoint)


class _EvaluateIfDue(TrainerCallback):
    """Lets a run that goes on begin with the evaluation that it was stopped in."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.evaluate_if_due()
