"""Make one plain LoRA of a mixture: the best low-rank copy of its mean update, trained on the mixture's own logits.

Servers that take one adapter, or merge it, can then run it. What the router knew is lost as far as one update cannot
hold it, so the loss that it kept is measured on each kind of text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dylo_moe.core import IGNORE_INDEX, DyLoRA_MoE
from dylo_moe.errors import ExpertError
from dylo_moe.skills.acquisition import Batches
from dylo_moe.spec import ExpertSpec

STUDENT = "distilled"


class KeptLoss(NamedTuple):
    """Losses on one kind of text, in nats per labelled token.

    Attributes:
        base: Of the base model alone.
        mixture: Of the mixture.
        start: Of the low-rank copy of the mean update, before training.
        distilled: Of the LoRA in the end.
    """

    base: float
    mixture: float
    start: float
    distilled: float


def low_rank(down: Sequence[Tensor], up: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a sum of low-rank updates, without forming the sum (Eckart-Young).

    Args:
        down: ``A`` of each update, ``(rank_e, in_features)``.
        up: ``B`` of each, ``(out_features, rank_e)``, with its scale.
        rank: Rank of the approximation.

    Returns:
        ``A``, ``(rank, in_features)``, and ``B``, ``(out_features, rank)``, float32, of lower rank where the ranks of
        the updates do not sum to it; each carries the square roots of the singular values.
    """
    rows, columns = torch.cat([part.double() for part in down]), torch.cat([part.double() for part in up], dim=1)
    left, left_rest = torch.linalg.qr(columns)
    right, right_rest = torch.linalg.qr(rows.T)
    u, values, v = torch.linalg.svd(left_rest @ right_rest.T)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    return (roots[:, None] * (v[:kept] @ right.T)).float(), (left @ u[:, :kept] * roots).float()


@torch.no_grad()
def mean_weights(model: DyLoRA_MoE, samples: Mapping[str, Batches]) -> Tensor:
    """Return the mean routing weight of each active expert over the samples' tokens, ``(num_gates, num_experts)``."""
    sums, count = torch.zeros(0), 0.0
    for batch in (batch for batches in samples.values() for batch in batches):
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        weights = model(ids, mask).routing_weights
        assert weights is not None
        found = torch.einsum("gbse,bs->ge", weights.double(), mask.double()).cpu()
        sums, count = found if not count else sums + found, count + float(mask.sum())
    if not count:
        raise ExpertError("there is no sample to distill the mixture on; give at least one")
    return sums / count


def add_student(model: DyLoRA_MoE, rank: int, weights: Tensor) -> None:
    """Add an expert to a mixture that is the best low-rank copy of its mean update.

    Args:
        model: The mixture; afterwards ``distilled`` is the last of its experts, and only that one has gradients.
        rank: Rank of the copy.
        weights: Mean weight of each expert at each gate, or at the only one; see ``mean_weights``.
    """
    experts, teachers = model.experts, [*model.experts.active]
    layers: list[tuple[str, Any]] = [
        (path, layer) for path, layer in experts.base_model.named_modules() if isinstance(layer, LoraLayer)
    ]
    targets = sorted({path.rpartition(".")[2] for path, _ in layers})
    gate_of = {id(module): gate for gate, layer in enumerate(experts.decoder.layers) for module in layer.modules()}
    experts.create(STUDENT, ExpertSpec(rank, alpha=rank, target_modules=targets))
    for _, layer in layers:
        if STUDENT not in layer.lora_A:
            continue
        row = weights[gate_of[id(layer)] if len(weights) > 1 else 0]
        scales = dict(zip(teachers, row.tolist(), strict=True)) | ({experts.shared: 1.0} if experts.shared else {})
        names = [name for name in scales if name in layer.lora_A]
        down = [layer.lora_A[name].weight.detach() for name in names]
        up = [layer.lora_B[name].weight.detach() * scales[name] * layer.scaling[name] for name in names]
        a, b = low_rank(down, up, rank)
        with torch.no_grad():  # ranks beyond those stay as PEFT starts them, and can train
            layer.lora_A[STUDENT].weight[: len(a)] = a
            layer.lora_B[STUDENT].weight[:, : len(a)] = b
    experts.freeze(*(name for name in experts.adapters if name != STUDENT))
    model.router.requires_grad_(False)


def student_logits(model: DyLoRA_MoE, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the logits of the base with the copy alone, without the shared expert, ``(batch, seq, vocabulary)``."""
    alone = torch.zeros(1, 1, len(model.experts.active_adapters), device=input_ids.device)
    alone[..., model.experts.active.index(STUDENT)] = 1
    logits: Tensor = model(input_ids, attention_mask, routing_weights=alone).logits
    return logits


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence from teacher to student at the labelled tokens, in nats.

    Args:
        student: Logits, ``(batch, seq, vocabulary)``.
        teacher: Logits of the same shape.
        labels: ``(batch, seq)``, -100 where there is no loss.
    """
    labelled = labels[:, 1:] != IGNORE_INDEX
    wanted, got = teacher[:, :-1][labelled].float(), student[:, :-1][labelled].float()
    return F.kl_div(got.log_softmax(dim=-1), wanted.log_softmax(dim=-1), log_target=True, reduction="batchmean")
