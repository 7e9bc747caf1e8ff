"""A thin HF Trainer: the model sums the losses, and the checkpoints are the project's own format.

Covered: label smoothing, gradient accumulation and data parallelism leave the sum of the losses as it is, and
evaluation counts tokens, per domain. Everything else is the Trainer's.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from dylo_moe.core.losses import expert_load
from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.errors import CheckpointError, first_line
from dylo_moe.training.metrics import domain_metrics, example_sums


class DyLoRATrainer(Trainer):
    """Trains the experts and the router of a ``DyLoRA_MoE``.

    Args:
        model: The mixture.
        domains: Names of the domains that the column ``domain`` of the datasets counts.
        train_sampler: The order to train in; the Trainer's own by default.
        **kwargs: As for ``transformers.Trainer``.
    """

    model: DyLoRA_MoE

    def __init__(
        self, model: DyLoRA_MoE, domains: list[str], train_sampler: Sampler[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, compute_metrics=self._domain_metrics, **kwargs)
        self.domains = domains
        self.train_sampler = train_sampler
        # The Trainer's smoother would take the labels away from the model, and the router's losses with them.
        self.label_smoother = None
        self._chosen: Tensor | None = None
        self.add_callback(_EpochOfSampler(self))

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.train_sampler is not None:
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

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
            self._settle_load()
            load = self.model.router.expert_load[:, self.model.experts.active_indices()]
            for batch in batches:
                batch.update(num_tokens_in_batch=tokens, expert_load=load)
        return batches, num_items

    def _settle_load(self) -> None:
        """Makes what the last global batch chose, over all processes, the router's ``expert_load``."""
        if self._chosen is not None:
            chosen = self.accelerator.reduce(self._chosen, "sum")
            self.model.router.expert_load[:, self.model.experts.active_indices()] = chosen.to(
                self.model.router.expert_load
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
        inputs = {key: value for key, value in inputs.items() if key not in ("domain", "length")}
        inputs["label_smoothing"] = self.args.label_smoothing_factor
        inputs["return_logits"] = return_outputs
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            chosen = expert_load(outputs["router_logits"], inputs["attention_mask"], self.model.router.top_k)
            self._chosen = chosen if self._chosen is None else self._chosen + chosen
        return (loss, outputs) if return_outputs else loss

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

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._settle_load()
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, CheckpointError) as error:
            # torch reports a full disk as a RuntimeError; what is half written must not be resumed from
            free = shutil.disk_usage(folder.parent).free / 2**20
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"cannot write {folder}, with {free:.1f} MiB free: {first_line(error)}; free space or choose another "
                "--output_dir, then go on with --resume_from_checkpoint; earlier checkpoints are intact"
            ) from error

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.save_pretrained(Path(output_dir or self.args.output_dir or "."))

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_weights(resume_from_checkpoint)

    @override
    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.model.load_weights(self.state.best_model_checkpoint)


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
