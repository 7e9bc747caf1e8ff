"""Acquiring a skill: judge it, choose its expert, train that one alone, and solve the router anew.

What is trained is one expert on the frozen base, with no other one active: a step costs the same however many experts
there are, and none of them changes. How to train is the caller's affair. The router learns last, from sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylo_moe.core.features import base_features, check_frozen_features
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.errors import ExpertError
from dylo_moe.skills.library import NoveltyReport, SkillEntry, SkillLibrary

Batches = Iterable[Mapping[str, Tensor]]
"""Each with ``input_ids`` and ``attention_mask``, ``(batch, seq)``: one example a row."""


@dataclass(frozen=True)
class SkillData:
    """What a skill is judged and routed by.

    Attributes:
        name: The skill's.
        sample: Of its training rows.
        held_out: Rows that are not trained on.
        rows: How many training rows there are.
    """

    name: str
    sample: Batches
    held_out: Batches
    rows: int = 0


class Look(NamedTuple):
    """What the frozen base makes of some examples.

    Attributes:
        embeddings: ``(examples, hidden_size)`` float32, the mean of the last hidden states over each example's tokens.
        routed: ``(examples, hidden_size)`` float32, the mean of what the router reads.
        tokens: ``(tokens, hidden_size)`` float32, what the router reads at each token.
        example: ``(tokens,)``, the example that a token belongs to.
    """

    embeddings: Tensor
    routed: Tensor
    tokens: Tensor
    example: Tensor


@dataclass(frozen=True)
class Acquisition:
    """What became of a skill.

    Attributes:
        entry: As it stands in the library.
        report: How it stood to what was known before.
    """

    entry: SkillEntry
    report: NoveltyReport


def look(model: DyLoRA_MoE, batches: Batches) -> Look:
    """Runs the base alone over examples.

    Raises:
        RoutingError: The router of the model does not read frozen features.
    """
    embeddings, routed, tokens, example = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    seen = 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        features = base_features(model, ids, mask)
        real = mask.bool()
        embeddings.append(_means(features.last, real))
        routed.append(_means(features.routed, real))
        tokens.append(features.routed[real].float().cpu())
        row = torch.arange(len(ids), device=real.device)[:, None].expand_as(real)
        example.append(row[real].cpu() + seen)
        seen += len(ids)
    return Look(torch.cat(embeddings), torch.cat(routed), torch.cat(tokens), torch.cat(example))


def _means(features: Tensor, real: Tensor) -> Tensor:
    """Means over real tokens, from ``(batch, seq, hidden_size)`` to ``(batch, hidden_size)``, on the CPU."""
    return ((features * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)).float().cpu()


def acquire_skill(
    model: DyLoRA_MoE,
    library: SkillLibrary,
    data: SkillData,
    train: Callable[[str], bool],
    *,
    extend: bool | None = None,
    measure: str | None = None,
    told: Callable[[NoveltyReport, str], object] = lambda report, expert: None,
    **expert_options: Any,
) -> Acquisition | None:
    """Lets a model learn one more skill.

    A new skill gets an expert of its own; one that is known already extends the expert of the nearest. Older experts
    are frozen. Afterwards all experts are mature, so that routing is sparse in evaluation.

    Args:
        model: With routing ``final`` or ``prefix:K``.
        library: The skills it knows; gets the new one.
        data: What to judge and to route by.
        train: Called with the expert's name, which alone is active and trains; False where it was stopped.
        extend: Whether to extend the nearest expert; by default where the skill is not new and that expert not frozen.
        measure: What novelty is judged by; see ``SkillLibrary.judge``.
        told: Called before training, with what was judged and the expert.
        **expert_options: For ``ExpertManager.create``.

    Returns:
        What became of it; None where training was stopped, and model and library are to be loaded again.

    Raises:
        RoutingError: The router of the model does not read frozen features.
        ExpertError: The skill is known by that name, the experts are not those of the library, or the one that is to be
            extended is frozen.
    """
    check_frozen_features(model.routing_mode)
    _check_library(model, library, data.name)
    sample, held_out = look(model, data.sample), look(model, data.held_out)
    report = library.judge(sample.embeddings, sample.routed, measure)
    nearest = _to_extend(model, library, report, extend)
    expert = nearest or _new_expert(model, library, expert_options)
    told(report, expert)
    with training_alone(model, expert):
        if not train(expert):
            return None
    library.gate.learn(sample.tokens, model.experts.names.index(expert))
    with torch.no_grad():
        model.router.gates[0].copy_(library.gate.weight())
    model.set_maturity()
    entry = SkillEntry(name=data.name, expert=expert, extended=nearest is not None, rows=data.rows)
    library.add(entry, sample.embeddings, held_out.embeddings, held_out.routed)
    return Acquisition(entry, report)


def _to_extend(model: DyLoRA_MoE, library: SkillLibrary, report: NoveltyReport, extend: bool | None) -> str | None:
    """The expert that learns the skill on top of what it knows; None for a new one."""
    wanted = not report.novel if extend is None else extend
    if not wanted or report.nearest is None:
        return None
    expert = library.expert_of(report.nearest)
    if expert not in model.experts.frozen:
        return expert
    if extend:
        raise ExpertError(
            f"--extend always would train {expert!r}, the nearest expert, which is frozen; unfreeze it by "
            f"dylora-moe experts --unfreeze {expert}, or leave --extend out"
        )
    return None


def _check_library(model: DyLoRA_MoE, library: SkillLibrary, name: str) -> None:
    if name in library.names:
        raise ExpertError(f"the model has a skill {name!r} already; give this one another name")
    learned = model.experts.names[: library.gate.num_experts]
    unknown = {skill.expert for skill in library.skills} - set(learned)
    if unknown or len(model.experts.names) - len(learned) > 1:
        raise ExpertError(
            f"the model has the experts {', '.join(model.experts.names)} and its library tells "
            f"{library.gate.num_experts} of them apart; begin with one expert, and let acquire add the others"
        )


def _new_expert(model: DyLoRA_MoE, library: SkillLibrary, options: dict[str, Any]) -> str:
    """The expert that no skill has claimed, such as the one that a model begins with, or one that is added."""
    if len(model.experts.names) > library.gate.num_experts:
        return model.experts.names[-1]
    return model.add_expert(**options)


@contextmanager
def training_alone(model: DyLoRA_MoE, expert: str) -> Iterator[None]:
    """One expert active and training in the block; afterwards all are active, and train as before."""
    experts, router = model.experts, model.router
    trained = [gate.requires_grad for gate in router.gates]
    router.requires_grad_(False)
    experts.set_active(expert)  # no other one is computed, or has a gradient
    try:
        yield
    finally:
        experts.activate_all()
        for gate, requires_grad in zip(router.gates, trained, strict=True):
            gate.requires_grad_(requires_grad)
