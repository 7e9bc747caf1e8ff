"""The part of the Trainer that saves, stops and resumes.

Covered: atomic checkpoints in the project's own format, from one process or from several that hold shards of the
model; resumed runs that end as if they had never been stopped. What is trained, and how, is in ``trainer``.
"""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from dylo_moe.core import DyLoRA_MoE
from dylo_moe.errors import CheckpointError, first_line
from dylo_moe.training.checkpointing import checkpoints
from dylo_moe.training.checkpointing.interruption import EvaluationInterrupted
from dylo_moe.training.distributed import full_state_dict, loading_full_tensors

_LOG = logging.getLogger(__name__)

_DATA_FILE = "data.json"
"""File of a checkpoint that holds the SHA-256 of its training data and their order."""


class ResumableTrainer(Trainer):
    """Trainer of a ``DyLoRA_MoE`` whose checkpoints are complete or do not exist.

    A subclass has to call ``evaluate_if_due`` when training begins.

    Args:
        data_identity: Fingerprint of the training data and its order; a checkpoint resumes on the same data only.
        save_in_place: Whether to rename no folder, for object storage that cannot.
        **kwargs: As for ``transformers.Trainer``.
    """

    model: DyLoRA_MoE
    eval_dataset: Dataset[object]

    def __init__(self, data_identity: str = "", save_in_place: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_identity = data_identity
        self.save_in_place = save_in_place

    @override
    def evaluate(
        self,
        eval_dataset: Dataset[object] | dict[str, Dataset[object]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as the Trainer does, without drawing any of the random numbers of training."""
        with self._preserve_rng():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluate_without_logging(self, prefix: str) -> dict[str, float]:
        """Return metrics on the held-out rows, named ``<prefix>_<metric>``, without logging or early stopping."""
        with self._preserve_rng():
            return self.predict(self.eval_dataset, metric_key_prefix=prefix).metrics or {}

    def _preserve_rng(self) -> AbstractContextManager[None]:
        devices = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        return torch.random.fork_rng(devices=devices)

    @override
    def _evaluate(
        self, trial: object, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationInterrupted:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    @override
    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        if not metrics:  # interrupted; the resumed run repeats the evaluation
            return False
        best: bool = super()._determine_best_metric(metrics, trial)
        if best:
            folder = checkpoints.folder_of(Path(self._get_output_dir(trial)), self.state.global_step)
            self.state.best_model_checkpoint = str(folder)
        return best

    def evaluate_if_due(self) -> None:
        """Run the evaluation that an interruption cut off or came before; called when training begins."""
        step, epoch, strategy = self.state.global_step, self.state.epoch or 0.0, self.args.eval_strategy
        done = any("eval_loss" in entry for entry in self.state.log_history if entry.get("step") == step)
        if not step or done:
            return
        # due where the Trainer evaluates after the last step that was taken
        due = strategy == IntervalStrategy.EPOCH and (epoch == int(epoch) or self._is_finished())
        if strategy == IntervalStrategy.STEPS:
            due = step % self.state.eval_steps == 0
        if due:
            self._determine_best_metric(self._evaluate(None, None), None)

    @override
    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        """Run an epoch, unless all steps are done: the Trainer would take one more when such a run is resumed."""
        if self._is_finished():
            self.control.should_training_stop = True
        else:
            run_epoch: Callable[..., None] = super()._run_epoch
            run_epoch(*args, **kwargs)

    def _is_finished(self) -> bool:
        """Return whether all steps are done, or early stopping had ended the run before it was interrupted."""
        patience = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in patience)
        return stopped or self.state.global_step >= self.state.max_steps

    @override
    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint that gets its name only once all of it is on the disk."""
        folder = checkpoints.folder_of(Path(self._get_output_dir(trial)), self.state.global_step)
        staging = checkpoints.staging_path(folder, in_place=self.save_in_place)
        try:
            if self.args.should_save:
                checkpoints.begin_write(folder, in_place=self.save_in_place)
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.commit(folder, in_place=self.save_in_place)
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder.parent, self.args.save_total_limit, Path(best) if best else None)
        except (OSError, RuntimeError, CheckpointError) as error:
            # torch reports a full disk as a RuntimeError
            free = shutil.disk_usage(folder.parent).free / 2**20
            checkpoints.rollback(folder, in_place=self.save_in_place)
            raise CheckpointError(
                f"cannot write {folder}, with {free:.1f} MiB free: {first_line(error)}; free space or choose another "
                "`output_dir`, then resume with `resume_from_checkpoint`; earlier checkpoints are intact"
            ) from error

    def _write_checkpoint(self, folder: Path) -> None:
        """Write the files of a checkpoint, the same ones as the Trainer's own method."""
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
            (folder / _DATA_FILE).write_text(json.dumps({"sha256": self.data_identity}) + "\n")

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the mixture from the main process; with FSDP, all processes take part in gathering it."""
        state = full_state_dict(self.model, ("lora_", "router.")) if self.is_fsdp_enabled else None
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if _internal_call:  # the checkpoint around it is what becomes atomic
            self.model.write_files(folder, state)
        else:
            self.model.save_pretrained(folder, state_dict=state, in_place=self.save_in_place)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # the Trainer would also write the frozen base model into each checkpoint
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.check(folder)
        saved_identity = json.loads((folder / _DATA_FILE).read_text()).get("sha256")
        if saved_identity is None:
            _LOG.warning(
                "%s has an older record of its training data, which cannot be compared with this run's: make sure that "
                "the data, the seed and the batch size are the same",
                folder,
            )
        elif saved_identity != self.data_identity:
            raise CheckpointError(
                f"the checkpoint {folder} was trained on other data, or in another order, than this run has; give the "
                "`datasets`, `seed`, batch size and other data flags of the run that wrote it"
            )
        with loading_full_tensors():
            self.model.load_weights(folder)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch: the parameter groups differ
            raise CheckpointError(
                f"the optimizer of the checkpoint {checkpoint} is not this run's ({first_line(error)}); give the "
                "`optim`, `weight_decay` and `router_learning_rate` of the run that wrote it"
            ) from error

    @override
    def _init_training_state(self, *args: object, **kwargs: object) -> tuple[int, int]:
        """Restore the Trainer's progress, and find the best checkpoint by its step: the folder may have moved."""
        progress: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = checkpoints.folder_of(Path(self._get_output_dir(None)), self.state.best_global_step)
            self.state.best_model_checkpoint = str(best) if checkpoints.find_corruption(best) is None else None
            if self.state.best_model_checkpoint is None:
                _LOG.warning("%s, the best so far, is gone: the best is chosen among later checkpoints", best)
                self.state.best_metric = self.state.best_global_step = None
        return progress

    @override
    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        checkpoints.check(Path(self.state.best_model_checkpoint))
        with loading_full_tensors():
            self.model.load_weights(self.state.best_model_checkpoint)
