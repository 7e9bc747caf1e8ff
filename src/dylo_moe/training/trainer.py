"""The Trainer of a mixture: routing statistics while training, losses per domain when evaluating.

The model sums its losses itself. Label smoothing, gradient accumulation and data parallelism leave that sum as it is.
Saving and resuming are in ``resumable``; everything else is ``transformers.Trainer``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.core import DyLoRA_MoE, DyLoRAOutput, expert_load, expert_mask, updated_selection_bias
from dylo_moe.training.checkpointing import ResumableTrainer
from dylo_moe.training.distributed import check_sharding
from dylo_moe.training.domain_metrics import domain_metrics, example_sums
from dylo_moe.training.monitoring import MonitoringCallback
from dylo_moe.training.schedules import warm_restarts


class DyLoRATrainer(ResumableTrainer):
    """Trainer of the experts and the router of a ``DyLoRA_MoE``.

    Args:
        model: The mixture.
        domains: Names of the domains that the datasets' column ``domain`` indexes.
        train_sampler: Order of the training examples; the Trainer's own by default.
        data_identity: Fingerprint of the training data and its order; a checkpoint resumes on the same data only.
        router_learning_rate: Peak learning rate of the router; that of the experts by default.
        warm_restarts: Whether to train in two cosine cycles that each warm up, instead of the arguments' schedule.
        balance_update_rate: How far the router's ``selection_bias`` moves towards even load after each optimizer step;
            None leaves it alone. See ``update_expert_load``.
        **kwargs: As for ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: DyLoRA_MoE,
        domains: list[str],
        train_sampler: Sampler[int] | None = None,
        data_identity: str = "",
        router_learning_rate: float | None = None,
        warm_restarts: bool = False,
        balance_update_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_identity, model=model, compute_metrics=self._domain_metrics, **kwargs)
        check_sharding(self.args, getattr(self.accelerator.state, "fsdp_plugin", None))
        self.domains = domains
        self.train_sampler = train_sampler
        self.router_learning_rate = router_learning_rate
        self.warm_restarts = warm_restarts
        self.balance_update_rate = balance_update_rate
        # The Trainer's smoother would take the labels away from the model, and the router's losses with them.
        self.label_smoother = None
        self._batch_load: Tensor | None = None
        self._expert_mask: Tensor | None = None
        self.add_callback(_TrainerEvents(self))

    @override
    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> Sampler[int] | None:
        if self.train_sampler is not None:
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

    def set_sampler_epoch(self, epoch: int) -> None:
        """Pass the epoch that begins to the training sampler, if it takes one.

        accelerate does so as well, but does not reach the sampler of a resumed run with several processes: the rest of
        a later epoch would then repeat the order of the first one.
        """
        set_epoch = getattr(self.train_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, with separate groups for the router if it has its own learning rate."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.router_learning_rate is not None:
            router = {id(parameter) for parameter in self.model.router.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in router]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in router]
                    optimizer.add_param_group({**group, "params": own, "lr": self.router_learning_rate})
        return optimizer

    @override
    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self.warm_restarts:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warm_restarts(optimizer, warmup, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Return the parts of a global batch, each with the counts that make their losses add up to the whole's.

        ``num_tokens_in_batch`` is the number of real tokens over all parts and processes. ``expert_load``, the
        fraction ``f`` of the balance loss, is that of the previous global batch: known before the first part runs,
        and the same for every part and process.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum().to(device)
            tokens = self.accelerator.reduce(tokens, "sum")
            load = self.model.router.expert_load[:, self.model.experts.active_indices()]
            for batch in batches:
                batch.update(num_tokens_in_batch=tokens, expert_load=load)
        return batches, num_items

    def update_expert_load(self) -> None:
        """Store the choices of the last global batch, summed over all processes, as the router's ``expert_load``.

        Called after each optimizer step. With a ``balance_update_rate``, the router's ``selection_bias`` moves by that
        much (DeepSeek-V3, 2024, section 2.1.2): up for an expert chosen less than its fair share, down for one chosen
        more. Training mixes all experts, so a choice here is what sparse routing would choose: an expert among the
        ``top_k`` of logits plus bias. The bias changes no routing weight and has no gradient.
        """
        if self._batch_load is None:
            return
        router, active = self.model.router, self.model.experts.active_indices()
        load = self.accelerator.reduce(self._batch_load, "sum").to(router.expert_load)
        router.expert_load[:, active] = load
        if self.balance_update_rate is not None:
            bias = router.selection_bias[:, active]
            router.selection_bias[:, active] = updated_selection_bias(
                bias, load, self.balance_update_rate, self._expert_mask
            )
        self._batch_load = None

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, DyLoRAOutput]:
        arguments: dict[str, object] = {k: value for k, value in inputs.items() if k not in ("domain", "length")}
        arguments |= {"label_smoothing": self.args.label_smoothing_factor, "return_logits": return_outputs}
        loss, outputs = super().compute_loss(
            model, arguments, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            logits, router = outputs["router_logits"], self.model.router
            self._expert_mask = expert_mask(logits)
            # as routing does, only the choice takes the bias
            biased = logits + router.selection_bias[:, None, None, self.model.experts.active_indices()]
            load = expert_load(biased, inputs["attention_mask"], router.top_k)
            self._batch_load = load if self._batch_load is None else self._batch_load + load
            for monitor in self._monitors():
                monitor.on_forward(self, inputs, outputs, load)
        return (loss, outputs) if return_outputs else loss

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for monitor in self._monitors():
            monitor.on_backward(self, loss)
        return loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log an entry of the training, with the monitors' figures added.

        An evaluation before or after the training is not logged, only returned: TensorBoard would have no folder for
        it yet, and trackers that have ended their run would start another one.
        """
        if not self.is_in_train:
            return
        if "learning_rate" in logs:
            for monitor in self._monitors():
                logs.update(monitor.entries(self))
        super().log(logs, start_time)

    @override
    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> None:
        """Log, evaluate and save where due, after the monitors have checked the step and may have ended the run."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            for monitor in self._monitors():
                monitor.before_log_eval_save(self)
        log_save_evaluate: Callable[..., None] = super()._maybe_log_save_evaluate
        log_save_evaluate(*args, **kwargs)

    def _monitors(self) -> list[MonitoringCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, MonitoringCallback)]

    @override
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return no loss, sums per example instead of logits, and each example's domain.

        The sums, ``(batch, 3 + num_experts)``, are small to gather and do not depend on how examples were batched.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output: DyLoRAOutput = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        sums = example_sums(output, inputs["labels"], inputs["attention_mask"], len(self.model.experts.active))
        return None, sums, inputs["domain"]

    def _domain_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums, domain_of = prediction.predictions, prediction.label_ids
        assert isinstance(sums, np.ndarray) and isinstance(domain_of, np.ndarray)
        return domain_metrics(sums, domain_of, self.domains, self.model.experts.active)


class _TrainerEvents(TrainerCallback):
    """Callback that passes the events of the training loop to the trainer's own methods."""

    def __init__(self, trainer: DyLoRATrainer) -> None:
        self._trainer = trainer

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.evaluate_if_due()

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.set_sampler_epoch(int(state.epoch or 0))

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.update_expert_load()  # before anything is saved or evaluated
