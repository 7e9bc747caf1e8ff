"""Acquisition of a skill: judge its novelty, choose its expert, train that expert alone, and solve the router again.

One expert on the frozen base is trained while no other expert is active, so the cost of a step does not depend on the
number of experts, and no other expert changes. The caller supplies the training. The router is solved last, in closed
form from sums over the features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylo_moe.core import DyLoRA_MoE
from dylo_moe.errors import ExpertError
from dylo_moe.skills.features import base_features, check_frozen_features
from dylo_moe.skills.library import NoveltyReport, SkillLibrary, SkillRecord

Batches = Iterable[Mapping[str, Tensor]]
"""Batches with ``input_ids`` and ``attention_mask``, ``(batch, seq)``, one example in each row."""


@dataclass(frozen=True)
class SkillData:
    """Examples that a skill is judged and routed by.

    Attributes:
        name: Name of the skill.
        sample: Sample of its training rows.
        held_out: Rows that are not trained on.
        rows: Number of all its training rows.
    """

    name: str
    sample: Batches
    held_out: Batches
    rows: int = 0


class SkillFeatures(NamedTuple):
    """Features of examples in the frozen base, on the CPU.

    Attributes:
        embeddings: Mean of the last hidden states over each example's tokens, ``(examples, hidden_size)`` float32.
        routed: Mean of the router's input over each example's tokens, ``(examples, hidden_size)`` float32.
        tokens: Input of the router at each token, ``(tokens, hidden_size)`` float32.
        example: Number of the example that each token belongs to, ``(tokens,)``.
    """

    embeddings: Tensor
    routed: Tensor
    tokens: Tensor
    example: Tensor


@dataclass(frozen=True)
class Acquisition:
    """Result of learning a skill.

    Attributes:
        entry: Entry of the skill in the library.
        report: Novelty of the skill among those that were known before.
    """

    entry: SkillRecord
    report: NoveltyReport


def extract_features(model: DyLoRA_MoE, batches: Batches) -> SkillFeatures:
    """Return the features of examples in the base model without experts.

    Raises:
        RoutingError: The router of the model does not read frozen features.
    """
    embeddings, routed, tokens, example = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    count = 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        features = base_features(model, ids, mask)
        real = mask.bool()
        embeddings.append(_means(features.last, real))
        routed.append(_means(features.routed, real))
        tokens.append(features.routed[real].float().cpu())
        row = torch.arange(len(ids), device=real.device)[:, None].expand_as(real)
        example.append(row[real].cpu() + count)
        count += len(ids)
    return SkillFeatures(torch.cat(embeddings), torch.cat(routed), torch.cat(tokens), torch.cat(example))


def _means(features: Tensor, real: Tensor) -> Tensor:
    """Return means over real tokens, from ``(batch, seq, hidden_size)`` to ``(batch, hidden_size)``, on the CPU."""
    return ((features * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)).float().cpu()


def acquire_skill(
    model: DyLoRA_MoE,
    library: SkillLibrary,
    data: SkillData,
    train: Callable[[str], bool],
    *,
    extend: bool | None = None,
    measure: str | None = None,
    on_judged: Callable[[NoveltyReport, str], object] = lambda report, expert: None,
    **expert_options: Any,
) -> Acquisition | None:
    """Teach a model one more skill.

    A new skill gets an expert of its own; a skill that is not new trains the expert of the nearest skill further. No
    other expert changes. Afterwards all experts are mature, so that routing is sparse in evaluation.

    Args:
        model: Model with routing ``context:K``, ``prefix:K`` or ``final``.
        library: The skills that the model knows, to which the new one is added.
        data: Examples to judge the skill and to teach the router by.
        train: Trains the expert of the given name, the only one that is active and has gradients; returns False if
            training was stopped.
        extend: Whether to train the nearest expert further instead of adding one; by default only for a skill that is
            not new, and if that expert is not frozen.
        measure: Measure of novelty; see ``SkillLibrary.judge``.
        on_judged: Called before training with the novelty report and the name of the expert.
        **expert_options: Options of a new expert; see ``ExpertManager.create``.

    Returns:
        The result, or None if training was stopped; model and library must then be loaded again.

    Raises:
        RoutingError: The router of the model does not read frozen features.
        ExpertError: The name of the skill is taken, the experts of the model and of the library differ, or the expert
            to extend is frozen.
    """
    check_frozen_features(model.routing_mode)
    _check_library(model, library, data.name)
    sample, held_out = extract_features(model, data.sample), extract_features(model, data.held_out)
    report = library.judge(sample.embeddings, sample.routed, measure)
    nearest = _expert_to_extend(model, library, report, extend)
    unused = model.experts.names[library.gate.num_experts :]  # the first expert of a new model has no skill yet
    expert = nearest or (unused[-1] if unused else model.add_expert(**expert_options))
    on_judged(report, expert)
    with training_only(model, expert):
        if not train(expert):
            return None
    library.gate.learn(sample.tokens, model.experts.names.index(expert))
    with torch.no_grad():
        model.router.gates[0].copy_(library.gate.weight())
    model.set_maturity()
    entry = SkillRecord(name=data.name, expert=expert, extended=nearest is not None, rows=data.rows)
    library.add(entry, sample.embeddings, held_out.embeddings, held_out.routed)
    return Acquisition(entry, report)


def _expert_to_extend(
    model: DyLoRA_MoE, library: SkillLibrary, report: NoveltyReport, extend: bool | None
) -> str | None:
    """Return the known expert to train further, or None to train a new one."""
    extends = not report.novel if extend is None else extend
    if not extends or report.nearest is None:
        return None
    expert = library.expert_of(report.nearest)
    if expert not in model.experts.frozen:
        return expert
    if extend:
        raise ExpertError(
            f"`extend` must not be set where the nearest expert, {expert!r}, is frozen; unfreeze it with dylora-moe "
            f"experts --unfreeze {expert}, or leave `extend` out"
        )
    return None


def _check_library(model: DyLoRA_MoE, library: SkillLibrary, name: str) -> None:
    if name in library.names:
        raise ExpertError(f"the model has a skill {name!r} already; give this one another name")
    learned = model.experts.names[: library.gate.num_experts]
    unknown = {skill.expert for skill in library.skills} - set(learned)
    if unknown or len(model.experts.names) - len(learned) > 1:
        raise ExpertError(
            f"the model has the experts {', '.join(model.experts.names)}, and its library knows "
            f"{library.gate.num_experts} of them; begin with one expert, and let acquire add the others"
        )


@contextmanager
def training_only(model: DyLoRA_MoE, expert: str) -> Iterator[None]:
    """Activate one expert, the only part of the model with gradients, in the block; then restore the model."""
    experts, router = model.experts, model.router
    before = [gate.requires_grad for gate in router.gates]
    shared = [name for name in (experts.shared,) if name is not None and name not in experts.frozen]
    router.requires_grad_(False)
    experts.freeze(*shared)  # it is part of every skill
    experts.set_active(expert)  # the others are neither computed nor trained
    try:
        yield
    finally:
        experts.unfreeze(*shared)
        experts.activate_all()
        for gate, requires_grad in zip(router.gates, before, strict=True):
            gate.requires_grad_(requires_grad)
