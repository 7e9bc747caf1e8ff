"""Library of the skills that a model knows: embeddings of their examples, and the expert that learned each.

It is saved in the folder of the model's checkpoint, together with the model:

    skills.json           names, experts, and the measurements after each skill
    skills.safetensors    embeddings of samples of each skill, and the sums from which the router is solved

No text is stored. An embedding is the mean of an example's hidden states: ``(hidden_size,)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core import DyLoRA_MoE, checkpoint
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError, first_line
from dylo_moe.skills.continual_metrics import Matrix, backward_transfer, forgetting
from dylo_moe.skills.novelty import (
    Distances,
    auroc,
    calibrated_threshold,
    cosine_distances,
    mahalanobis_distances,
    router_entropy,
)
from dylo_moe.skills.ridge_gate import DEFAULT_RIDGE, RidgeGate

DESCRIPTION_FILE, TENSORS_FILE = "skills.json", "skills.safetensors"
_KNOWN_SHARE = 0.95
"""Fraction of a skill's held-out examples inside its threshold."""

MEASURES: dict[str, Distances] = {"cosine": cosine_distances, "mahalanobis": mahalanobis_distances}
ENTROPY = "entropy"


class SkillRecord(BaseModel):
    """Record of one skill, as it is saved.

    Attributes:
        name: Name of the skill.
        expert: Name of the expert that learned it.
        extended: Whether the expert had learned another skill before.
        rows: Number of training rows.
        losses: Held-out loss of this skill and of the older ones, by name, measured right after this one was learned,
            in nats per token.
        usage: Fraction of the tokens of this skill and of the older ones that each expert got, measured at that time.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    expert: str
    extended: bool = False
    rows: int = 0
    losses: dict[str, float] = {}
    usage: dict[str, dict[str, float]] = {}


class StreamMetrics(NamedTuple):
    """Effect of later skills on the losses of older ones, as the mean over all skills but the last, in nats per token.

    Attributes:
        forgetting: Loss at the end less the lowest loss before; see ``continual_metrics``.
        backward_transfer: Loss right after learning less the loss at the end; see ``continual_metrics``.
    """

    forgetting: float
    backward_transfer: float


class _Description(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    ridge: float
    skills: list[SkillRecord]


@dataclass(frozen=True)
class NoveltyReport:
    """Novelty of a dataset among the known skills.

    Attributes:
        novel: Whether the dataset is a new skill.
        nearest: Name of the nearest known skill; None if no skill is known.
        measure: Measure that decided: ``cosine``, ``mahalanobis`` or ``entropy``.
        similarity: Cosine between the mean embeddings of the dataset and of each known skill.
        distance: Median over the examples of the distance to each known skill, in thresholds of that skill; above 1 is
            farther than nearly all held-out examples of the skill.
        outlier_share: Fraction of the examples outside the threshold of every known skill.
        high_entropy_share: Fraction of the examples whose routing entropy is above that of nearly all held-out
            examples of the known skills; None for a router with a single expert.
    """

    novel: bool
    nearest: str | None
    measure: str
    similarity: dict[str, float]
    distance: dict[str, float]
    outlier_share: float
    high_entropy_share: float | None


class _Embeddings(NamedTuple):
    """Embeddings of a skill's examples, each ``(examples, hidden_size)`` float32; see ``SkillLibrary.add``."""

    reference: Tensor
    held_out: Tensor
    routed: Tensor


class SkillLibrary:
    """Library of skills with their embeddings, and the gate that routes to their experts.

    Args:
        hidden_size: Width of the base's hidden states.
        ridge: Penalty of the gate; see ``RidgeGate``.

    Attributes:
        skills: Records of the skills in the order of learning.
        gate: Gate that learned the tokens of every skill.
    """

    def __init__(self, hidden_size: int, ridge: float = DEFAULT_RIDGE) -> None:
        self.skills: list[SkillRecord] = []
        self.gate = RidgeGate(hidden_size, ridge)
        self._embeddings: list[_Embeddings] = []

    @property
    def names(self) -> list[str]:
        """Names of the skills in the order of learning."""
        return [skill.name for skill in self.skills]

    def embeddings(self) -> Tensor:
        """Return the mean embedding of each skill's sample: ``(skills, hidden_size)`` float64."""
        return torch.stack([one.reference.double().mean(dim=0) for one in self._embeddings])

    def expert_of(self, skill: str) -> str:
        """Return the name of the expert that learned a skill."""
        return self.skills[self.names.index(skill)].expert

    def add(self, skill: SkillRecord, reference: Tensor, held_out: Tensor, routed: Tensor) -> None:
        """Add a skill.

        Args:
            skill: Record of the skill.
            reference: Embeddings of a sample of its training rows, ``(examples, hidden_size)``.
            held_out: Embeddings of its held-out rows, to calibrate the threshold, ``(examples, hidden_size)``.
            routed: Means of the router's input over the held-out rows, of the same shape.

        Raises:
            ValueError: The library has a skill of that name, or a sample is empty.
        """
        if skill.name in self.names:
            raise ValueError(f"there is a skill {skill.name!r} already")
        if not len(reference) or not len(held_out):
            raise ValueError(f"the skill {skill.name!r} has no examples")
        self.skills.append(skill)
        self._embeddings.append(
            _Embeddings(*(rows.detach().cpu().float().clone() for rows in (reference, held_out, routed)))
        )

    def judge(self, embeddings: Tensor, routed: Tensor, measure: str | None = None) -> NoveltyReport:
        """Judge whether a dataset is a new skill: most of its examples are outside the threshold of each known skill.

        Args:
            embeddings: Embeddings of a sample of its examples, ``(examples, hidden_size)``.
            routed: Means of the router's input over the same examples, of the same shape.
            measure: ``cosine``, ``mahalanobis`` or ``entropy``; by default the distance that separates the known skills
                better, see ``best_measure``. With fewer than two experts ``entropy`` falls back to the default.
        """
        high_entropy_share = self._high_entropy_share(routed) if self.gate.num_experts > 1 else None
        if measure is None or (measure == ENTROPY and high_entropy_share is None):
            measure = self.best_measure()
        if not self.skills:
            return NoveltyReport(True, None, measure, {}, {}, 1.0, high_entropy_share)
        distance = self.best_measure() if measure == ENTROPY else measure
        embeddings = embeddings.detach().cpu()
        ratios = MEASURES[distance](embeddings, self._references) / self.thresholds(distance)
        medians = ratios.median(dim=0).values
        cosines = 1 - cosine_distances(embeddings.double().mean(dim=0, keepdim=True), self._references)[0]
        outlier_share = float((ratios.min(dim=1).values > 1).double().mean())
        decisive = high_entropy_share if measure == ENTROPY and high_entropy_share is not None else outlier_share
        return NoveltyReport(
            novel=decisive > 0.5,
            nearest=self.names[int(medians.argmin())],
            measure=measure,
            similarity=dict(zip(self.names, cosines.tolist(), strict=True)),
            distance=dict(zip(self.names, medians.tolist(), strict=True)),
            outlier_share=outlier_share,
            high_entropy_share=high_entropy_share,
        )

    def _high_entropy_share(self, routed: Tensor) -> float:
        weight = self.gate.weight()
        known, new = (
            router_entropy((rows.detach().cpu().double() @ weight.T).softmax(dim=-1))
            for rows in (torch.cat([one.routed for one in self._embeddings]), routed)
        )
        return float((new > calibrated_threshold(known, _KNOWN_SHARE)).double().mean())

    @property
    def _references(self) -> list[Tensor]:
        return [one.reference for one in self._embeddings]

    def thresholds(self, measure: str) -> Tensor:
        """Return the distance that contains ``_KNOWN_SHARE`` of each skill's held-out examples: ``(skills,)``."""
        found = []
        for index, one in enumerate(self._embeddings):
            own = MEASURES[measure](one.held_out, self._references)[:, index]
            found.append(calibrated_threshold(own, _KNOWN_SHARE))
        # a threshold of 0, where all held-out examples equal the mean, cannot be divided by
        return torch.tensor(found, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).eps)

    def pair_aurocs(self, measure: str) -> Tensor:
        """Return the AUROC of held-out examples of skill j against those of skill i, if only skill i is known.

        Returns:
            ``(skills, skills)`` float64, indexed ``[i, j]``; NaN for i = j.
        """
        count = len(self.skills)
        table = torch.full((count, count), torch.nan, dtype=torch.float64)
        for known in range(count):
            scores = [MEASURES[measure](one.held_out, [self._references[known]])[:, 0] for one in self._embeddings]
            for other in range(count):
                if other != known:
                    table[known, other] = auroc(scores[known].numpy(), scores[other].numpy())
        return table

    def best_measure(self) -> str:
        """Return the distance that separates the known skills better: ``cosine``, unless ``mahalanobis`` is better."""
        if len(self.skills) < 2:
            return "cosine"
        cosine, mahalanobis = (self.pair_aurocs(name).nanmean() for name in ("cosine", "mahalanobis"))
        return "mahalanobis" if mahalanobis > cosine else "cosine"

    def loss_matrix(self) -> Matrix:
        """Return the held-out losses ``[i, j]`` of skill j right after skill i was learned, in nats per token.

        Returns:
            ``(skills, skills)`` float64; NaN for losses that were not measured.
        """
        rows = [[skill.losses.get(name, np.nan) for name in self.names] for skill in self.skills]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows))

    def stream_metrics(self) -> StreamMetrics | None:
        """Return forgetting and backward transfer, or None with fewer than two skills or with losses missing.

        They need the losses of every skill after it and after each later skill.
        """
        losses = self.loss_matrix()
        if len(losses) < 2 or np.isnan(losses[np.tril_indices(len(losses))]).any():
            return None
        return StreamMetrics(forgetting(losses, lower_is_better=True), backward_transfer(losses, lower_is_better=True))

    def remove_expert(self, name: str, column: int) -> None:
        """Remove an expert, the router's ``column`` of that number, and the skills that it learned."""
        kept = [index for index, skill in enumerate(self.skills) if skill.expert != name]
        gone = {skill.name for skill in self.skills if skill.expert == name}
        self.skills = [self.skills[index] for index in kept]
        self._embeddings = [self._embeddings[index] for index in kept]
        for skill in self.skills:
            skill.losses = {other: loss for other, loss in skill.losses.items() if other not in gone}
            skill.usage = {other: shares for other, shares in skill.usage.items() if other not in gone}
        self.gate.forget(column)

    def merge_experts(self, name: str, other: str, column: int, other_column: int) -> None:
        """Assign the skills of the expert ``other``, and its column of the router, to the expert ``name``."""
        for skill in self.skills:
            skill.expert = name if skill.expert == other else skill.expert
            for shares in skill.usage.values():
                if other in shares:
                    shares[name] = shares.get(name, 0.0) + shares.pop(other)
        self.gate.merge(column, other_column)

    def write_files(self, folder: Path) -> None:
        """Write the library's files into a folder; the caller makes the write of the folder atomic."""
        tensors = {f"gate.{name}": tensor for name, tensor in self.gate.state().items()}
        for index, one in enumerate(self._embeddings):
            tensors |= {f"{kind}.{index}": rows for kind, rows in one._asdict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
        description = _Description(ridge=self.gate.ridge, skills=self.skills)
        (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, experts: Sequence[str] | None = None) -> "SkillLibrary":
        """Read the library of a checkpoint.

        Args:
            folder: Folder of the checkpoint.
            experts: Names of the model's experts, which must include those of all skills; not checked by default.

        Raises:
            CheckpointError: The checkpoint has no library, the library is damaged, or it names other experts.
        """
        file = folder / DESCRIPTION_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no skills: {DESCRIPTION_FILE} is missing, which acquire writes")
        try:
            description = _Description.model_validate_json(file.read_bytes())
            tensors = load_file(folder / TENSORS_FILE)
            self = cls(tensors["gate.gram"].shape[0], description.ridge)
            self.gate.load({name: tensors[f"gate.{name}"] for name in self.gate.state()})
            for index, skill in enumerate(description.skills):
                self.add(skill, *(tensors[f"{kind}.{index}"] for kind in _Embeddings._fields))
        except (OSError, SafetensorError, ValidationError, KeyError, ValueError) as error:
            raise CheckpointError(f"the skills in {folder} cannot be read: {first_line(error)}") from error
        for skill in self.skills:
            if experts is not None and skill.expert not in experts:
                raise CheckpointError(
                    f"{file} gives skill {skill.name!r} to the expert {skill.expert!r}, which is not in the checkpoint"
                )
        return self


def save_with_skills(model: DyLoRA_MoE, library: SkillLibrary, path: Path) -> None:
    """Write a checkpoint and its skills in one step, so that a reader finds either both old or both new.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    with atomic_directory(path, marker=checkpoint.DESCRIPTION_FILE) as folder:
        model.write_files(folder, final_folder=path)
        library.write_files(folder)
