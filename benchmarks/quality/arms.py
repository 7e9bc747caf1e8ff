"""The arms of ``benchmarks.quality``: mixtures and plain LoRA on one shared frozen base, each with its own clock.

An arm's clock runs only while it trains, not while batches are made, while it is evaluated or while other arms train.
The learning rate follows the used share of the clock, so that a faster arm takes more steps of the same schedule.
"""

import copy
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from typing_extensions import override

from dylo_moe.core.base.structure import backbone
from dylo_moe.core.lora.manager import count_parameters
from dylo_moe.core.losses import IGNORE_INDEX, linear_causal_lm_loss
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.core.routing.balance import expert_load
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.data.pipeline import prepare_data

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
NUM_EXPERTS, EXPERT_RANK = 4, 16
MAX_LENGTH, BATCH_SIZE = 256, 4
WARM_UP, MAX_NORM, SLICE_SECONDS = 0.1, 1.0, 5.0

Batch = dict[str, Tensor]
Losses = dict[str, float]


class Data:
    """The batches of one seed, the same for every arm, and its held-out rows.

    Args:
        domains: Names of datasets in the registry.
        tokenizer: Tokenizer of the base model.
        held_out_percent: Share of the held-out rows to evaluate on.
        seed: Seed of the mixing, the order and the choice of held-out rows.
    """

    def __init__(
        self, domains: list[str], tokenizer: PreTrainedTokenizerBase, held_out_percent: float, seed: int
    ) -> None:
        prepared = prepare_data(
            domains, tokenizer, max_length=MAX_LENGTH, validation_percent=held_out_percent, seed=seed
        )
        self.domains = prepared.domains
        self._train, self._held_out = prepared.train, prepared.validation
        assert tokenizer.pad_token_id is not None
        self._collator = TokenCollator(tokenizer.pad_token_id)
        # the programs' order: equal shares, rows of similar length together
        self._order = list(prepared.sampler(temperature=math.inf, seed=seed, batch_size=BATCH_SIZE))

    def train_batch(self, step: int) -> Batch:
        """Return the batch of a step; the rows repeat once all have been seen."""
        places = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        return self._collate(self._train, [self._order[place % len(self._order)] for place in places])

    def held_out_losses(self, nats: Callable[[Batch], Tensor]) -> Losses:
        """Return the loss in nats per labelled token of each domain, over all its held-out rows."""
        return {domain: self._held_out_loss(index, nats) for index, domain in enumerate(self.domains)}

    def held_out_rows(self) -> int:
        """Return the number of rows that an evaluation reads."""
        return len(self._held_out)

    def _held_out_loss(self, domain: int, nats: Callable[[Batch], Tensor]) -> float:
        rows = np.flatnonzero(self._held_out.domains == domain)
        rows = rows[np.argsort(self._held_out.lengths[rows], kind="stable")].tolist()
        total, count = 0.0, 0
        for first in range(0, len(rows), BATCH_SIZE):
            batch = self._collate(self._held_out, rows[first : first + BATCH_SIZE])
            with torch.no_grad():
                total += nats(batch).item()
            count += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        return total / count

    def _collate(self, rows: TokenRows, indices: list[int]) -> Batch:
        batch = self._collator([rows[index] for index in indices])
        del batch["domain"]
        return batch


@dataclass(frozen=True)
class Entry:
    """Description of an arm that is not built yet.

    Attributes:
        title: Title in the table.
        routing: Routing mode of a mixture; None for plain LoRA.
        rank: Rank of the one adapter of plain LoRA; a mixture's experts have ``EXPERT_RANK`` each.
        chunked_loss: Whether plain LoRA is trained with the project's loss instead of transformers'.
        rate_of: Name of the arm whose learning rate, found by the sweep, this one uses.
    """

    title: str
    rate_of: str
    routing: str | None = None
    rank: int = NUM_EXPERTS * EXPERT_RANK
    chunked_loss: bool = False

    def build(self, base: PreTrainedModel, seed: int, rate: float, seconds: float) -> "Arm":
        """Build a new arm on the weights of ``base``, with a clock of ``seconds``."""
        set_seed(seed)
        # new modules that share the memory of all parameters and buffers
        shared = {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())}
        copied = copy.deepcopy(base, shared)
        if self.routing is not None:
            return MixtureArm(DyLoRA_MoE(copied, NUM_EXPERTS, rank=EXPERT_RANK, routing=self.routing), rate, seconds)
        config = LoraConfig(task_type="CAUSAL_LM", r=self.rank, lora_alpha=2 * self.rank, target_modules=TARGETS)
        kind = ChunkedLoraArm if self.chunked_loss else LoraArm
        return kind(get_peft_model(copied, config), rate, seconds)


ENTRIES = {
    "prefix": Entry("mixture, `prefix`", "prefix", routing="prefix"),
    "per_layer": Entry("mixture, `per_layer`", "per_layer", routing="per_layer"),
    "final": Entry("mixture, `final`", "final", routing="final"),
    "lora_64": Entry("LoRA r=64", "lora_64"),
    "lora_64_chunked": Entry("LoRA r=64, our loss", "lora_64", chunked_loss=True),
}


class Arm(ABC):
    """A model in training, its optimizer and its clock.

    Args:
        model: Model whose trainable parameters are trained.
        rate: Peak learning rate.
        seconds: Training time in seconds.
    """

    def __init__(self, model: Any, rate: float, seconds: float) -> None:
        self.model = model.train()
        self.rate = rate
        self.seconds = seconds
        self.used = 0.0
        self.steps = 0
        self.tokens = 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # fused, as in the Trainer: many small tensors cost no more than few large ones
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0, fused=True)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Return the loss to minimize."""

    @abstractmethod
    def held_out(self, data: Data) -> dict[str, Losses]:
        """Return held-out losses per domain for each way of evaluating this arm; the last way is the intended use."""

    @property
    def finished(self) -> bool:
        """Whether the clock is used up."""
        return self.used >= self.seconds

    def warm_up(self, batch: Batch) -> None:
        """Run one step without timing or training, so that allocations and lazy set-up are on no clock."""
        with torch.random.fork_rng(devices=[]):
            self.loss(batch).backward()
        self._optimizer.zero_grad()

    def run_slice(self, data: Data) -> None:
        """Train for ``SLICE_SECONDS``, or until the clock is used up."""
        end = self.used + SLICE_SECONDS
        while self.used < end and not self.finished:
            batch = data.train_batch(self.steps)
            self._step(batch)
            self.steps += 1
            self.tokens += int(batch["attention_mask"].sum())

    def _step(self, batch: Batch) -> None:
        start = time.perf_counter()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
        # read as late as possible: a step past the end of the clock gets rate 0 and has no effect
        share = (self.used + time.perf_counter() - start) / self.seconds
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * schedule(share)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.used += time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """Return the record of the training, without the losses."""
        return {
            "learning_rate": self.rate,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.used,
            "trainable_parameters": count_parameters(self.model, trainable=True),
        }


class MixtureArm(Arm):
    """The project's mixture, trained as its Trainer does: the balance loss uses the load of the previous batch."""

    def __init__(self, model: DyLoRA_MoE, rate: float, seconds: float) -> None:
        super().__init__(model, rate, seconds)
        self._load = model.router.expert_load.clone()

    @override
    def loss(self, batch: Batch) -> Tensor:
        output = self.model(**batch, expert_load=self._load, return_logits=False)
        self._load = expert_load(output.router_logits, batch["attention_mask"], self.model.router.top_k)
        return output.loss

    @override
    def warm_up(self, batch: Batch) -> None:
        load = self._load
        super().warm_up(batch)
        self._load = load

    @override
    def held_out(self, data: Data) -> dict[str, Losses]:
        self.model.eval()
        dense = data.held_out_losses(self._nats)
        self.model.set_maturity()
        return {"dense": dense, "sparse": data.held_out_losses(self._nats)}

    def _nats(self, batch: Batch) -> Tensor:
        output = self.model(**batch, num_items_in_batch=1, return_logits=False)
        assert output.lm_loss is not None
        return output.lm_loss


class LoraArm(Arm):
    """PEFT's LoRA with transformers' own loss."""

    @override
    def loss(self, batch: Batch) -> Tensor:
        # no cache in training, as the Trainer sets it
        return self.model(**batch, use_cache=False).loss

    @override
    def held_out(self, data: Data) -> dict[str, Losses]:
        self.model.eval()
        return {"plain": data.held_out_losses(partial(plain_nats, self.model.get_base_model()))}


class ChunkedLoraArm(LoraArm):
    """The same LoRA with the project's loss, to separate the gain of the mixture from that of a faster loss."""

    @override
    def loss(self, batch: Batch) -> Tensor:
        return plain_nats(self.model.get_base_model(), batch) / (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def plain_nats(causal_lm: PreTrainedModel, batch: Batch) -> Tensor:
    """Return a causal LM's cross-entropy, summed over the labelled tokens, computed without logits."""
    hidden = backbone(causal_lm)(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
    return linear_causal_lm_loss(hidden, causal_lm.get_output_embeddings().weight, batch["labels"], num_items=1)


def schedule(share: float) -> float:
    """Return the learning rate's factor after a share of the time: linear up, then half a cosine down to 0."""
    if share < WARM_UP:
        return share / WARM_UP
    return (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP)))) / 2
