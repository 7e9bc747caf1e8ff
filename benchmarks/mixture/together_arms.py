"""The arms of study A: plain LoRA and mixtures, in the same layers and with as many parameters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_schedule_with_warmup, set_seed

from benchmarks.mixture.setting import Batch, answer_losses, answers_only, inputs_of, load_base
from dylo_moe.core import DyLoRA_MoE
from dylo_moe.skills import SkillFeatures, cluster_examples, teach_router

FIRST_LAYER = 7
"""Number of layers without experts, from whose output a taught router reads; the default for a base of 30 layers."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
MIXTURE_EXPERTS = 4
"""Experts of the mixture without taught routes, as many as the default of ``train``."""


@dataclass(frozen=True)
class Sizes:
    """Size of the arms on one data set.

    Attributes:
        rank: Rank of LoRA, and sum of the ranks of a mixture.
        domains: Number of domains, each with an expert of rank 1 beside the shared one.
    """

    rank: int
    domains: int

    @property
    def shared_rank(self) -> int:
        """Rank of the shared expert."""
        return self.rank - self.domains


Teach = Callable[[DyLoRA_MoE, SkillFeatures, Tensor, int], None]


@dataclass(frozen=True)
class Arm:
    """An arm that is not built yet.

    Attributes:
        build: From sizes to a model.
        teach: How the router is solved before the first step; None leaves it to training.
        by_label: Whether each row is sent to its domain's expert by the true label.
        rate_of: Name of the arm whose rate, found by a sweep, this one uses.
    """

    build: Callable[[Sizes], nn.Module]
    rate_of: str
    teach: Teach | None = None
    by_label: bool = False


def lora(sizes: Sizes, times: int = 1) -> nn.Module:
    """Return plain LoRA; in two layers its rank is one larger, which is more than the parameters of a gate."""
    base, rank = load_base(), times * sizes.rank
    layers = range(FIRST_LAYER, base.config.num_hidden_layers)
    wider = {
        rf"layers\.{layer}\.self_attn\.{name}": rank + 1 for layer in (layers[-2], layers[-1]) for name in ATTENTION
    }
    return _with_lora(base, rank, ATTENTION, {} if times > 1 else wider)


def lora_everywhere(sizes: Sizes) -> nn.Module:
    """Return LoRA on all linear modules with as many parameters as ``lora`` has, rounded up."""
    wanted = _trainable(lora(sizes))
    one = _trainable(_with_lora(load_base(), 1, ALL_LINEAR, {}))
    return _with_lora(load_base(), -(-wanted // one), ALL_LINEAR, {})


def _with_lora(base: Any, rank: int, targets: list[str], ranks: dict[str, int]) -> nn.Module:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        layers_to_transform=[*range(FIRST_LAYER, base.config.num_hidden_layers)],
        rank_pattern=ranks,
        alpha_pattern={name: 2 * wider for name, wider in ranks.items()},
    )
    return get_peft_model(base, config)


def mixture(sizes: Sizes, expert_scale: str = "sum_to_one") -> nn.Module:
    """Return a mixture whose router learns in training."""
    return DyLoRA_MoE(
        load_base(),
        MIXTURE_EXPERTS,
        rank=sizes.rank // MIXTURE_EXPERTS,
        target_modules="attention",
        routing=f"prefix:{FIRST_LAYER}",
        expert_scale=expert_scale,
    )


def shared_and_routed(sizes: Sizes) -> nn.Module:
    """Return a shared expert with one routed expert of rank 1 for each domain, of which a token gets one."""
    model = DyLoRA_MoE(
        load_base(),
        sizes.domains,
        rank=1,
        shared_rank=sizes.shared_rank,
        target_modules="attention",
        routing=f"context:{FIRST_LAYER}",
        top_k=1,
        expert_scale="unit",
        balance_coefficient=0.0,
    )
    model.router.sparse_training = True
    model.router.requires_grad_(False)
    return model


def teach_domains(model: DyLoRA_MoE, features: SkillFeatures, domains: Tensor, seed: int) -> None:
    """Solve the router from the domains of examples."""
    teach_router(model, features, domains.numpy())


def teach_clusters(model: DyLoRA_MoE, features: SkillFeatures, domains: Tensor, seed: int) -> None:
    """Solve the router from clusters of the same examples."""
    teach_router(model, features, cluster_examples(features, len(model.experts.names), seed))


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parameters_of(model: nn.Module) -> int:
    """Return the number of parameters that an arm adds to the base, a solved gate's included."""
    router = model.router if isinstance(model, DyLoRA_MoE) else None
    solved = 0 if router is None else sum(p.numel() for p in router.parameters() if not p.requires_grad)
    return _trainable(model) + solved


ARMS = {
    "lora": Arm(lora, "lora"),
    "shared + routed, domains": Arm(shared_and_routed, "shared + routed, domains", teach_domains),
    "shared + routed, clusters": Arm(shared_and_routed, "shared + routed, domains", teach_clusters),
    "shared + routed, true label": Arm(shared_and_routed, "shared + routed, domains", teach_domains, by_label=True),
    "mixture": Arm(mixture, "mixture"),
    "mixture, unit scale": Arm(partial(mixture, expert_scale="unit"), "mixture, unit scale"),
    "lora, all linear": Arm(lora_everywhere, "lora, all linear"),
    "lora, twice the rank": Arm(partial(lora, times=2), "lora"),
}


def train(arm: Arm, model: nn.Module, batches: Sequence[Batch], rate: float, seed: int) -> Iterator[float]:
    """Train a model by AdamW with a cosine schedule, and yield the loss of each step in nats per token."""
    set_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    model.train()
    for batch in batches:
        loss = _loss(arm, model, batch)
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
    model.train(False)


def _loss(arm: Arm, model: Any, batch: Batch) -> Tensor:
    if isinstance(model, DyLoRA_MoE):
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return model(**given, **extra_of(arm, model, batch), return_logits=False).loss  # type: ignore[no-any-return]
    with answers_only(model, batch):
        logits = model(**inputs_of(batch)).logits
    return answer_losses(logits, batch).mean()


def extra_of(arm: Arm, model: Any, batch: Batch) -> dict[str, Any]:
    """Return the further arguments of a forward: the rows' experts, for an arm that is told them."""
    if not arm.by_label:
        return {}
    names = model.experts.names
    return {"adapter_names": [names[domain] for domain in batch["domain"].tolist()]}
