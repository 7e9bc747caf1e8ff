"""A thin HF Trainer: the model sums the losses, and evaluation counts tokens, per domain.

Covered: label smoothing, gradient accumulation and data parallelism leave the sum of the losses as it is. Checkpoints
and going on from them are in ``resumable``; everything else is the Trainer's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.core.balance import expert_load, expert_mask, updated_selection_bias
from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.training.metrics import domain_metrics, example_sums
from dylo_moe.training.monitoring import MonitoringCallback
from dylo_moe.training.processes import check_sharding
from dylo_moe.training.resumable import ResumableTrainer
from dylo_moe.training.schedules import warm_restarts


class DyLoRATrainer(ResumableTrainer):
    """Trains the experts and the router of a ``DyLoRA_MoE``.

    Args:
        model: The mixture.
        domains: Names of the domains that the column ``domain`` of the datasets counts.
        train_sampler: The order to train in; the Trainer's own by default.
        data_identity: Tells the training data and its order from others; a checkpoint is resumed on the same only.
        router_learning_rate: Peak learning rate of the router; that of the experts by default.
        warm_restarts: Two cosine cycles that each warm up, in the place of the schedule in the arguments.
        balance_update_rate: After each optimiser step, the router's ``selection_bias`` moves by this much towards even
            load; None leaves it alone. See ``settle_load``.
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
        self._chosen: Tensor | None = None
        self._among: Tensor | None = None
        self.add_callback(_SettleLoad(self))
        self.add_callback(_EpochOfSampler(self))

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.train_sampler is not None:
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the router in groups of its own where it has a rate of its own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.router_learning_rate is not None:
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
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Gives each part of a global batch the counts that make the parts' losses add up to the whole's.

        ``f`` of the balance loss is what the global batch before this one chose: known before the first part runs,
        and the same for every part and every process.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum().to(device)
            tokens = self.accelerator.reduce(tokens, "sum")
            load = self.model.router.expert_load[:, self.model.experts.active_indices()]
            for batch in batches:
                batch.update(num_tokens_in_batch=tokens, expert_load=load)
        return batches, num_items

    def settle_load(self) -> None:
        """Makes what the last global batch chose, over all processes, the router's ``expert_load``.

        Called after each optimiser step. With a ``balance_update_rate`` the router's bias
        then moves by it (DeepSeek-V3, 2024, section 2.1.2): up for an expert that was chosen less than its fair share,
        down for one that was chosen more. Training mixes all experts, so that "chosen" means what it will mean once
        routing is sparse: to be among the ``top_k`` of logits and bias. The bias is in no weight and has no gradient.
        """
        if self._chosen is None:
            return
        router, active = self.model.router, self.model.experts.active_indices()
        chosen = self.accelerator.reduce(self._chosen, "sum").to(router.expert_load)
        router.expert_load[:, active] = chosen
        if self.balance_update_rate is not None:
            bias = router.selection_bias[:, active]
            router.selection_bias[:, active] = updated_selection_bias(
                bias, chosen, self.balance_update_rate, self._among
            )
        self._chosen = None

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        part, inputs = inputs, {key: value for key, value in inputs.items() if key not in ("domain", "length")}
        inputs["label_smoothing"] = self.args.label_smoothing_factor
        inputs["return_logits"] = return_outputs
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            logits, router = outputs["router_logits"], self.model.router
            self._among = expert_mask(logits)
            # added where routing adds it: to the choice alone
            biased = logits + router.selection_bias[:, None, None, self.model.experts.active_indices()]
            chosen = expert_load(biased, inputs["attention_mask"], router.top_k)
            self._chosen = chosen if self._chosen is None else self._chosen + chosen
            for monitor in self._monitors():
                monitor.on_forward(self, part, outputs, chosen)
        return (loss, outputs) if return_outputs else loss

    @override
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for monitor in self._monitors():
            monitor.on_backward(self, loss)
        return loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Lets the monitors add to an entry of the training, before the history and the trackers get it.

        What is evaluated before or after a training is its caller's alone: TensorBoard would have no folder for it yet,
        and trackers that have ended their run would open another one.
        """
        if not self.is_in_train:
            return
        if "learning_rate" in logs:
            for monitor in self._monitors():
                logs.update(monitor.entries(self))
        super().log(logs, start_time)

    @override
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Lets the monitors end the run before anything is made of a step that went wrong."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            for monitor in self._monitors():
                monitor.on_milestone(self)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _monitors(self) -> list[MonitoringCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, MonitoringCallback)]

    @override
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sums per example in the place of logits: small to gather, and exact whatever the batches were."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output: DyLoRAOutput = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        sums = example_sums(output, inputs["labels"], inputs["attention_mask"], len(self.model.experts.active))
        return None, sums, inputs["domain"]

    def _domain_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return domain_metrics(
            prediction.predictions,  # type: ignore[arg-type]
            prediction.label_ids,  # type: ignore[arg-type]
            self.domains,
            self.model.experts.active,
        )


class _SettleLoad(TrainerCallback):
    """Lets the router know what a global batch chose, before anything is saved or evaluated."""

    def __init__(self, trainer: DyLoRATrainer) -> None:
        self._trainer = trainer

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.settle_load()


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins.

    accelerate does so too, but does not reach a sampler in the loader of a resumed run with several processes: the rest
    of a later epoch would then be that of the first one.
    """

    def __init__(self, trainer: DyLoRATrainer) -> None:
        self._trainer = trainer

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_epoch = getattr(self._trainer.train_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))
