"""What a training run says of itself: entries of the Trainer's log, warnings, and an end before a bad step.

Covered: norms of the gradients, the router, speed and memory; ``docs/training.md`` lists every name. The figures are
put into the Trainer's own log entries, so every tracker of ``--report_to`` shows them. Not covered: the losses on
held-out data, which an evaluation finds (``metrics``).
"""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.errors import TrainingError
from dylo_moe.training.checkpoints import newest_whole
from dylo_moe.training.gradients import ROUTER, gradient_norm, largest, parameter_groups
from dylo_moe.training.statistics import RoutingStatistics, routing_entries

logger = logging.getLogger(__name__)

COLLAPSED_ABOVE = 0.9
"""The router has collapsed if one expert gets more than this share of the tokens' routing weight at a gate."""
ZERO_GRADIENT_STEPS = 50
"""Something does not learn if its gradient is exactly zero for so many optimiser steps."""
MIB = 2**20


class MonitoringCallback(TrainerCallback):
    """A callback that ``DyLoRATrainer`` shows more than the Trainer's events do.

    The Trainer calls ``on_pre_optimizer_step`` when the gradients are clipped already, and ``on_log`` when the entry is
    in the history and with the trackers. So there are events of our own.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def on_forward(self, trainer: Trainer, inputs: dict[str, Any], output: DyLoRAOutput, load: Tensor) -> None:
        """Called after the forward of each part of a global batch, in training.

        Args:
            trainer: Where all of this happens.
            inputs: The part, with the column ``domain``.
            output: What the model returned.
            load: ``balance.expert_load`` of the part.
        """

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """Called after the backward of each part; after the last one the gradients are whole, and not clipped."""

    def on_milestone(self, trainer: Trainer) -> None:
        """Called after a step that is followed by an entry, an evaluation or a checkpoint, before any of them."""

    def entries(self, trainer: Trainer) -> dict[str, float]:
        """What to add to the log entry that is about to be written. Called in all processes at once."""
        return {}

    def _warn_once(self, trainer: Trainer, about: str, message: str) -> None:
        if about not in self._said and trainer.state.is_world_process_zero:
            logger.warning(message)
        self._said.add(about)


def monitoring_callbacks(domains: Sequence[str]) -> list[TrainerCallback]:
    """The callbacks of this module; ``domains`` are named as the column ``domain`` counts them."""
    return [GradientMonitoringCallback(), DyLoRAMonitoringCallback(domains)]


class GradientMonitoringCallback(MonitoringCallback):
    """Logs the norm of each expert's and the router's gradient, before clipping, at the step of the log entry.

    A loss, a gradient or a weight that is no finite number ends the run before anything of it is logged, evaluated or
    saved. A gradient that stays exactly zero is warned of, at the next log entry.

    Args:
        zero_gradient_steps: Optimiser steps in a row after which a zero gradient is worth a warning.
    """

    def __init__(self, zero_gradient_steps: int = ZERO_GRADIENT_STEPS) -> None:
        super().__init__()
        self.zero_gradient_steps = zero_gradient_steps

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model: DyLoRA_MoE = kwargs["model"]
        self._groups = parameter_groups(self._model)
        # all of these stay on the device, where remembering does not make it wait
        self._loss = self._bad_step = torch.zeros((), device=args.device)
        self._norms, self._zero_steps, self._most_zero_steps = torch.zeros(3, len(self._groups), device=args.device)
        self._bad_figures = torch.zeros(1 + len(self._groups), device=args.device)

    @override
    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        self._loss = self._loss + loss
        if not trainer.accelerator.sync_gradients:
            return
        norms = torch.stack([gradient_norm(parameters).to(loss.device) for parameters in self._groups.values()])
        figures = torch.cat([self._loss[None], norms])
        scaler = trainer.accelerator.scaler
        if scaler is None:
            finite = figures.isfinite().all()
        else:  # it makes gradients of float16 larger, expects infinite ones, and leaves their steps out itself
            finite, norms = self._loss.isfinite(), norms / scaler.get_scale()
        first = ~finite & (self._bad_step == 0)
        self._bad_step = torch.where(first, trainer.state.global_step + 1, self._bad_step)
        self._bad_figures = torch.where(first, figures, self._bad_figures)
        self._zero_steps = torch.where(norms == 0, self._zero_steps + 1, 0)
        self._most_zero_steps = torch.maximum(self._most_zero_steps, self._zero_steps)
        self._norms, self._loss = norms, torch.zeros_like(self._loss)

    @override
    def on_milestone(self, trainer: Trainer) -> None:
        weights = [parameter for group in self._groups.values() for parameter in group]
        sound = largest(weights).isfinite().to(self._bad_step)
        # of all processes, so that all of them end, or none
        said = trainer.accelerator.gather(torch.stack([self._bad_step, sound])[None]).tolist()
        bad_steps = [step for step, _ in said if step]
        if bad_steps:
            self._end(trainer, f"{self._what_is_wrong()} in step {min(bad_steps):.0f}")
        if not all(sound for _, sound in said):
            self._end(trainer, f"step {trainer.state.global_step} has left weights that are not finite")

    def _what_is_wrong(self) -> str:
        if not self._bad_step:
            return "the loss of another process is not finite"
        loss, *norms = self._bad_figures.tolist()
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        wrong = [name for name, norm in zip(self._groups, norms, strict=True) if not math.isfinite(norm)]
        return f"the loss is finite, but not the gradient of {', '.join(wrong)}"

    def _end(self, trainer: Trainer, what: str) -> NoReturn:
        # closes the progress bars and the trackers, as at any other end
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        checkpoint, _ = newest_whole(Path(trainer.args.output_dir or "."))
        then = (
            "there is no checkpoint of this run yet, so begin anew"
            if checkpoint is None
            else f"nothing of it was saved: go on with --resume_from_checkpoint {checkpoint}"
        )
        raise TrainingError(
            f"{what}; {then}, and with a lower --learning_rate (now {trainer.args.learning_rate:g}) or --max_grad_norm "
            f"(now {trainer.args.max_grad_norm:g})"
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
                f"raise --router_temperature (now {self._model.router.temperature:g}), which keeps its softmax apart "
                "from 0 and 1"
            )
        else:
            remedy = f"{_more_balance(self._model)}, so that the router sends it tokens"
        steps = f"{self.zero_gradient_steps} steps"
        self._warn_once(
            trainer, name, f"the gradient of {name} was exactly zero for {steps}, so it does not learn: {remedy}"
        )


class DyLoRAMonitoringCallback(MonitoringCallback):
    """Logs what the router did since the last log entry, and speed and memory.

    Warns if the router has collapsed: at a gate, one expert gets nearly all of the tokens' routing weight.

    Args:
        domains: Names of the domains, as the column ``domain`` counts them.
        collapsed_above: Share of the routing weight, 0 to 1, above which that is worth a warning.
    """

    def __init__(self, domains: Sequence[str], collapsed_above: float = COLLAPSED_ABOVE) -> None:
        super().__init__()
        self.domains = list(domains)
        self.collapsed_above = collapsed_above
        self._statistics = RoutingStatistics(len(self.domains))
        self._since = self._step_ended = time.monotonic()

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model: DyLoRA_MoE = kwargs["model"]
        self._statistics = RoutingStatistics(len(self.domains))
        self._logged_step = state.global_step
        self._since = self._step_ended = time.monotonic()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_ended = time.monotonic()

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._leave_out_pause()

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._leave_out_pause()

    def _leave_out_pause(self) -> None:
        now = time.monotonic()
        self._since, self._step_ended = self._since + now - self._step_ended, now

    @override
    def on_forward(self, trainer: Trainer, inputs: dict[str, Any], output: DyLoRAOutput, load: Tensor) -> None:
        self._statistics.add(output, inputs["attention_mask"], inputs.get("domain"), load)

    @override
    def entries(self, trainer: Trainer) -> dict[str, float]:
        sums = self._statistics.take(partial(trainer.accelerator.reduce, reduction="sum"))
        if sums is None:
            return {}
        experts, router = self._model.experts, self._model.router
        now, step = time.monotonic(), trainer.state.global_step
        entries = routing_entries(sums, step - self._logged_step, self.domains, experts.active)
        choice = sums.among.sum(dim=-1, keepdim=True) > 1  # a gate with one expert cannot but send everything there
        if choice.any():
            shares = sums.shares * choice
            entries["router/collapsed"] = float((shares > self.collapsed_above).sum() / choice.sum())
            self._warn_of_collapse(trainer, shares)
        for name, index in zip(experts.active, experts.active_indices(), strict=True):
            entries[f"router/maturity/{name}"] = float(router.maturity[index])
        entries["tokens_per_second"] = float(sums.tokens.sum()) / (now - self._since)
        self._since = self._step_ended = now
        self._logged_step = step
        return entries | memory(trainer)

    def _warn_of_collapse(self, trainer: Trainer, shares: Tensor) -> None:
        """Warns if an expert's share at a gate, ``(num_gates, num_experts)``, is too large."""
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
        return f"raise --balance_coefficient (now {coefficient:g})"
    return "give --balance switch"  # a bias moves choices, and what trains is mixed by weights that it leaves alone


def memory(trainer: Trainer) -> dict[str, float]:
    """Memory in MiB of the process that has the most: resident, and where there is one the accelerator's peak."""
    used = {"memory_mib": psutil.Process().memory_info().rss / MIB}
    device = trainer.args.device
    if device.type != "cpu":
        used["accelerator_memory_mib"] = torch.accelerator.max_memory_allocated(device) / MIB
    most = trainer.accelerator.reduce(torch.tensor(list(used.values()), device=device), "max")
    return dict(zip(used, most.tolist(), strict=True))
