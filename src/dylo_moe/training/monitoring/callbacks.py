"""Monitoring of a training run: figures in the Trainer's log, warnings, and an end before a bad step does harm.

Covered: gradient norms, the router, speed and memory; ``docs/training.md`` lists every name. The figures are added to
the Trainer's own log entries, so every experiment tracker shows them. Not covered: losses on held-out data, which an
evaluation computes (``domain_metrics``).
"""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.core import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.errors import TrainingError
from dylo_moe.training.checkpointing import checkpoints
from dylo_moe.training.monitoring.gradients import ROUTER, gradient_norm, max_abs, parameter_groups
from dylo_moe.training.monitoring.routing_statistics import RoutingStatistics, routing_entries

logger = logging.getLogger(__name__)

_COLLAPSED_ABOVE = 0.9
"""Share of the tokens' routing weight that one expert may get at a gate before the router counts as collapsed."""
_ZERO_GRADIENT_STEPS = 50
"""Number of optimizer steps in a row with a gradient of exactly zero after which a warning is logged."""
_MIB = 2**20


class MonitoringCallback(TrainerCallback):
    """Callback with additional events, which ``DyLoRATrainer`` calls.

    The Trainer's own events come too late: ``on_pre_optimizer_step`` after the gradients are clipped, and ``on_log``
    after the entry has reached the history and the trackers.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_forward(self, trainer: Trainer, inputs: dict[str, Tensor], output: DyLoRAOutput, load: Tensor) -> None:
        """Handle the forward of one part of a global batch; called in training only.

        Args:
            trainer: The calling trainer.
            inputs: The part, with the column ``domain``.
            output: The model's output.
            load: ``balance.expert_load`` of the part, ``(num_gates, num_experts)``.
        """

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """Handle the backward of one part; after the last part the gradients are complete and not yet clipped."""

    def before_log_eval_save(self, trainer: Trainer) -> None:
        """Handle the end of a step that is about to be logged, evaluated or saved."""

    def entries(self, trainer: Trainer) -> dict[str, float]:
        """Return figures to add to the next log entry; called in all processes at once."""
        return {}

    def _warn_once(self, trainer: Trainer, topic: str, message: str) -> None:
        if topic not in self._warned and trainer.state.is_world_process_zero:
            logger.warning(message)
        self._warned.add(topic)


def monitoring_callbacks(domains: Sequence[str]) -> list[TrainerCallback]:
    """Return the callbacks of this module, for the domains that the column ``domain`` indexes."""
    return [GradientMonitoringCallback(), DyLoRAMonitoringCallback(domains)]


class GradientMonitoringCallback(MonitoringCallback):
    """Callback that logs the norm of each expert's and the router's gradient, before clipping.

    A log entry has the norms of its own step. A loss, gradient or weight that is not finite ends the run before
    anything of that step is logged, evaluated or saved. A gradient that stays exactly zero causes a warning at the
    next log entry.

    Args:
        zero_gradient_steps: Number of optimizer steps in a row with a zero gradient that cause a warning.
    """

    def __init__(self, zero_gradient_steps: int = _ZERO_GRADIENT_STEPS) -> None:
        super().__init__()
        self.zero_gradient_steps = zero_gradient_steps

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DyLoRA_MoE | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        self._model = model
        self._groups = parameter_groups(self._model)
        # kept on the device, so that no step waits for it
        self._loss = self._bad_step = torch.zeros((), device=args.device)
        self._norms, self._zero_steps, self._most_zero_steps = torch.zeros(3, len(self._groups), device=args.device)
        self._bad_loss_and_norms = torch.zeros(1 + len(self._groups), device=args.device)

    @override
    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        self._loss = self._loss + loss
        if not trainer.accelerator.sync_gradients:
            return
        norms = torch.stack([gradient_norm(parameters).to(loss.device) for parameters in self._groups.values()])
        loss_and_norms = torch.cat([self._loss[None], norms])
        scaler = trainer.accelerator.scaler
        if scaler is None:
            finite = loss_and_norms.isfinite().all()
        else:  # float16 gradients are scaled, and the scaler itself skips steps that overflow
            finite, norms = self._loss.isfinite(), norms / scaler.get_scale()
        first_bad = ~finite & (self._bad_step == 0)
        self._bad_step = torch.where(first_bad, trainer.state.global_step + 1, self._bad_step)
        self._bad_loss_and_norms = torch.where(first_bad, loss_and_norms, self._bad_loss_and_norms)
        self._zero_steps = torch.where(norms == 0, self._zero_steps + 1, 0)
        self._most_zero_steps = torch.maximum(self._most_zero_steps, self._zero_steps)
        self._norms, self._loss = norms, torch.zeros_like(self._loss)

    @override
    def before_log_eval_save(self, trainer: Trainer) -> None:
        weights = [parameter for group in self._groups.values() for parameter in group]
        finite = max_abs(weights).isfinite().to(self._bad_step)
        # gathered, so that all processes end or none
        reports = trainer.accelerator.gather(torch.stack([self._bad_step, finite])[None]).tolist()
        bad_steps = [step for step, _ in reports if step]
        if bad_steps:
            self._end(trainer, f"{self._describe_bad_step()} in step {min(bad_steps):.0f}")
        if not all(finite for _, finite in reports):
            self._end(trainer, f"step {trainer.state.global_step} has left weights that are not finite")

    def _describe_bad_step(self) -> str:
        if not self._bad_step:
            return "the loss of another process is not finite"
        loss, *norms = self._bad_loss_and_norms.tolist()
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        bad = [name for name, norm in zip(self._groups, norms, strict=True) if not math.isfinite(norm)]
        return f"the loss is finite, but not the gradient of {', '.join(bad)}"

    def _end(self, trainer: Trainer, reason: str) -> NoReturn:
        # closes the progress bars and the trackers, as at any other end
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        checkpoint, _ = checkpoints.newest_whole(Path(trainer.args.output_dir or "."))
        remedy = (
            "there is no checkpoint of this run yet, so start again"
            if checkpoint is None
            else f"nothing of it was saved: resume with `resume_from_checkpoint` {checkpoint}"
        )
        raise TrainingError(
            f"{reason}; {remedy}, and with a lower `learning_rate` (now {trainer.args.learning_rate:g}) or "
            f"`max_grad_norm` (now {trainer.args.max_grad_norm:g})"
        )

    @override
    def entries(self, trainer: Trainer) -> dict[str, float]:
        values, zero_steps = torch.stack([self._norms, self._most_zero_steps.to(self._norms)]).tolist()
        self._most_zero_steps = torch.zeros_like(self._most_zero_steps)
        for name, steps in zip(self._groups, zero_steps, strict=True):
            if steps >= self.zero_gradient_steps:
                self._warn_of_zero(trainer, name)
        return {f"grad_norm/{name}": norm for name, norm in zip(self._groups, values, strict=True)}

    def _warn_of_zero(self, trainer: Trainer, name: str) -> None:
        if name == ROUTER:
            remedy = (
                f"raise `router_temperature` (now {self._model.router.temperature:g}), which keeps its softmax away "
                "from 0 and 1"
            )
        else:
            remedy = f"{_more_balance(self._model)}, so that the router sends it tokens"
        steps = f"{self.zero_gradient_steps} steps"
        self._warn_once(
            trainer, name, f"the gradient of {name} was exactly zero for {steps}, so it does not learn: {remedy}"
        )


class DyLoRAMonitoringCallback(MonitoringCallback):
    """Callback that logs routing statistics since the last log entry, speed and memory.

    Warns if the router has collapsed: at some gate, one expert gets nearly all of the tokens' routing weight.

    Args:
        domains: Names of the domains that the column ``domain`` indexes.
        collapsed_above: Share of the routing weight, 0 to 1, above which the router counts as collapsed.
    """

    def __init__(self, domains: Sequence[str], collapsed_above: float = _COLLAPSED_ABOVE) -> None:
        super().__init__()
        self.domains = list(domains)
        self.collapsed_above = collapsed_above
        self._statistics = RoutingStatistics(len(self.domains))
        self._since = self._step_ended = time.monotonic()

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DyLoRA_MoE | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        self._model = model
        self._statistics = RoutingStatistics(len(self.domains))
        self._logged_step = state.global_step
        self._since = self._step_ended = time.monotonic()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._step_ended = time.monotonic()

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._exclude_pause()

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._exclude_pause()

    def _exclude_pause(self) -> None:
        now = time.monotonic()
        self._since, self._step_ended = self._since + now - self._step_ended, now

    @override
    def on_forward(self, trainer: Trainer, inputs: dict[str, Tensor], output: DyLoRAOutput, load: Tensor) -> None:
        self._statistics.add(output, inputs["attention_mask"], inputs.get("domain"), load)

    @override
    def entries(self, trainer: Trainer) -> dict[str, float]:
        sums = self._statistics.take(partial(trainer.accelerator.reduce, reduction="sum"))
        if sums is None:
            return {}
        experts, router = self._model.experts, self._model.router
        now, step = time.monotonic(), trainer.state.global_step
        entries = routing_entries(sums, step - self._logged_step, self.domains, experts.active)
        has_choice = sums.expert_mask.sum(dim=-1, keepdim=True) > 1  # a gate with one expert sends all tokens to it
        if has_choice.any():
            shares = sums.shares * has_choice
            entries["router/collapsed"] = float((shares > self.collapsed_above).sum() / has_choice.sum())
            self._warn_of_collapse(trainer, shares)
        for name, index in zip(experts.active, experts.active_indices(), strict=True):
            entries[f"router/maturity/{name}"] = float(router.maturity[index])
        entries["tokens_per_second"] = float(sums.tokens.sum()) / (now - self._since)
        self._since = self._step_ended = now
        self._logged_step = step
        return entries | memory(trainer)

    def _warn_of_collapse(self, trainer: Trainer, shares: Tensor) -> None:
        """Warn if an expert's share at some gate is too large; ``shares`` is ``(num_gates, num_experts)``."""
        gate, expert = divmod(int(shares.argmax()), shares.shape[-1])
        share = float(shares[gate, expert])
        if share > self.collapsed_above:
            where = f" at layer {gate} and perhaps others" if len(shares) > 1 else ""
            self._warn_once(
                trainer,
                "collapse",
                f"the router has collapsed{where}: {self._model.experts.active[expert]} got {share:.0%} of the routing "
                f"weight up to step {trainer.state.global_step}: {_more_balance(self._model)}",
            )


def _more_balance(model: DyLoRA_MoE) -> str:
    coefficient = model.losses.balance_coefficient
    if coefficient:
        return f"raise `balance_coefficient` (now {coefficient:g})"
    # a selection bias changes top-k only; training is dense, so it cannot rebalance gradients
    return "set `balance` to switch"


def memory(trainer: Trainer) -> dict[str, float]:
    """Return memory in MiB, the maximum over all processes: resident, and the peak of the accelerator if any."""
    used = {"memory_mib": psutil.Process().memory_info().rss / _MIB}
    device = trainer.args.device
    if device.type != "cpu":
        used["accelerator_memory_mib"] = torch.accelerator.max_memory_allocated(device) / _MIB
    most = trainer.accelerator.reduce(torch.tensor(list(used.values()), device=device), "max")
    return dict(zip(used, most.tolist(), strict=True))
