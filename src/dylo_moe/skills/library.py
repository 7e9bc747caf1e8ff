"""The skills that a model knows: what their data looks like to the frozen base, and which expert learned them.

Kept with the model, in the folder of its checkpoint and written with it as one:

    skills.json           names, experts, and what was measured after each
    skills.safetensors    embeddings of samples of each skill, and the sums from which the router is solved

No text is kept. An embedding is the mean of an example's hidden states: ``(hidden_size,)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core import checkpoint
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError, first_line
from dylo_moe.skills.gates import DEFAULT_RIDGE, RidgeGate
from dylo_moe.skills.novelty import (
    Distances,
    auroc,
    calibrated_threshold,
    cosine_distances,
    mahalanobis_distances,
    router_entropy,
)

DESCRIPTION_FILE, TENSORS_FILE = "skills.json", "skills.safetensors"
KNOWN_SHARE = 0.95
"""Of a known skill's own held-out examples, so many lie within its threshold."""

MEASURES: dict[str, Distances] = {"cosine": cosine_distances, "mahalanobis": mahalanobis_distances}
ENTROPY = "entropy"


class SkillEntry(BaseModel):
    """What is said of one skill.

    Attributes:
        name: The skill's.
        expert: The expert that learned it.
        extended: Whether the expert had learned another skill before.
        rows: Training rows.
        losses: Held-out loss of each skill known by then, right after this one was learned, in nats per token.
        usage: For each skill known by then, the share of its tokens that each expert got.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    expert: str
    extended: bool = False
    rows: int = 0
    losses: dict[str, float] = {}
    usage: dict[str, dict[str, float]] = {}


class _Description(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    ridge: float
    skills: list[SkillEntry]


@dataclass(frozen=True)
class NoveltyReport:
    """How a body of data stands to the skills that are known.

    Attributes:
        novel: Whether it is none of them.
        nearest: The nearest known skill; None where none is known.
        measure: What decided: ``cosine``, ``mahalanobis`` or ``entropy``.
        similarity: To each known skill, the cosine between mean embeddings.
        distance: To each known skill, the median over examples of their distance, in thresholds of that skill: above 1
            is farther than nearly all of its own held-out examples.
        beyond: Share of the examples that lie beyond the threshold of every known skill.
        unsure: Share of the examples of which the router is less sure than of nearly all held-out examples of known
            skills; None where it has a single expert.
    """

    novel: bool
    nearest: str | None
    measure: str
    similarity: dict[str, float]
    distance: dict[str, float]
    beyond: float
    unsure: float | None


class _Looks(NamedTuple):
    """What is kept of a skill's examples, each ``(examples, hidden_size)`` float32."""

    reference: Tensor
    held_out: Tensor
    routed: Tensor


class SkillLibrary:
    """Skills with their embeddings, and the gate that tells their experts apart.

    Args:
        hidden_size: Width of the base's hidden states.
        ridge: See ``RidgeGate``.

    Attributes:
        skills: What is said of each, in the order in which they were learned.
        gate: Taught with each skill.
    """

    def __init__(self, hidden_size: int, ridge: float = DEFAULT_RIDGE) -> None:
        self.skills: list[SkillEntry] = []
        self.gate = RidgeGate(hidden_size, ridge)
        self._looks: list[_Looks] = []

    @property
    def names(self) -> list[str]:
        """The skills' names, in order."""
        return [skill.name for skill in self.skills]

    def embeddings(self) -> Tensor:
        """One for each skill, the mean of its sample: ``(skills, hidden_size)`` float64."""
        return torch.stack([looks.reference.double().mean(dim=0) for looks in self._looks])

    def expert_of(self, skill: str) -> str:
        """The expert that learned a skill."""
        return self.skills[self.names.index(skill)].expert

    def add(self, skill: SkillEntry, reference: Tensor, held_out: Tensor, routed: Tensor) -> None:
        """Takes in a skill.

        Args:
            skill: What to say of it.
            reference: Embeddings of a sample of its training rows, ``(examples, hidden_size)``.
            held_out: The same of held-out rows, to calibrate by.
            routed: Of the held-out rows, the means of what the router reads, of the same shape.

        Raises:
            ValueError: A skill of that name is there, or a sample is empty.
        """
        if skill.name in self.names:
            raise ValueError(f"there is a skill {skill.name!r} already")
        if not len(reference) or not len(held_out):
            raise ValueError(f"the skill {skill.name!r} has no example to know it by")
        self.skills.append(skill)
        self._looks.append(_Looks(*(rows.detach().cpu().float().clone() for rows in (reference, held_out, routed))))

    def judge(self, embeddings: Tensor, routed: Tensor, measure: str | None = None) -> NoveltyReport:
        """Whether a body of data is a new skill: most of its examples lie beyond the threshold of each known one.

        Args:
            embeddings: Of a sample of its examples, ``(examples, hidden_size)``.
            routed: The means of what the router reads in them, of the same shape.
            measure: ``cosine``, ``mahalanobis`` or ``entropy``; the better of the two distances on what is known by
                default, see ``best_measure``. The entropy needs two experts to decide between; below, as by default.
        """
        unsure = self._unsure(routed) if self.gate.num_experts > 1 else None
        if measure is None or (measure == ENTROPY and unsure is None):
            measure = self.best_measure()
        if not self.skills:
            return NoveltyReport(True, None, measure, {}, {}, 1.0, unsure)
        distance = self.best_measure() if measure == ENTROPY else measure
        embeddings = embeddings.detach().cpu()
        ratios = MEASURES[distance](embeddings, self._references) / self.thresholds(distance)
        medians = ratios.median(dim=0).values
        cosines = 1 - cosine_distances(embeddings.double().mean(dim=0, keepdim=True), self._references)[0]
        beyond = float((ratios.min(dim=1).values > 1).double().mean())
        return NoveltyReport(
            novel=(unsure if measure == ENTROPY and unsure is not None else beyond) > 0.5,
            nearest=self.names[int(medians.argmin())],
            measure=measure,
            similarity=dict(zip(self.names, cosines.tolist(), strict=True)),
            distance=dict(zip(self.names, medians.tolist(), strict=True)),
            beyond=beyond,
            unsure=unsure,
        )

    def _unsure(self, routed: Tensor) -> float:
        weight = self.gate.weight()
        known, new = (
            router_entropy((rows.detach().cpu().double() @ weight.T).softmax(dim=-1))
            for rows in (torch.cat([looks.routed for looks in self._looks]), routed)
        )
        return float((new > calibrated_threshold(known, KNOWN_SHARE)).double().mean())

    @property
    def _references(self) -> list[Tensor]:
        return [looks.reference for looks in self._looks]

    def thresholds(self, measure: str) -> Tensor:
        """For each skill the distance within which ``KNOWN_SHARE`` of its held-out examples lie: ``(skills,)``."""
        found = []
        for index, looks in enumerate(self._looks):
            own = MEASURES[measure](looks.held_out, self._references)[:, index]
            found.append(calibrated_threshold(own, KNOWN_SHARE))
        # where all held-out examples are the mean itself, anything else is beyond
        return torch.tensor(found, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).eps)

    def pair_aurocs(self, measure: str) -> Tensor:
        """How well held-out examples of skill j stand out where skill i alone is known: ``(i, j)``, NaN for i = j."""
        count = len(self.skills)
        table = torch.full((count, count), torch.nan, dtype=torch.float64)
        for known in range(count):
            scores = [MEASURES[measure](looks.held_out, [self._references[known]])[:, 0] for looks in self._looks]
            for other in range(count):
                if other != known:
                    table[known, other] = auroc(scores[known].numpy(), scores[other].numpy())
        return table

    def best_measure(self) -> str:
        """Mahalanobis where it tells the known skills apart better than the cosine, which is the simpler one."""
        if len(self.skills) < 2:
            return "cosine"
        cosine, mahalanobis = (self.pair_aurocs(name).nanmean() for name in ("cosine", "mahalanobis"))
        return "mahalanobis" if mahalanobis > cosine else "cosine"

    def remove_expert(self, name: str, column: int) -> None:
        """Forgets an expert, the router's ``column``, and the skills that it learned."""
        kept = [index for index, skill in enumerate(self.skills) if skill.expert != name]
        gone = {skill.name for skill in self.skills if skill.expert == name}
        self.skills = [self.skills[index] for index in kept]
        self._looks = [self._looks[index] for index in kept]
        for skill in self.skills:
            skill.losses = {one: loss for one, loss in skill.losses.items() if one not in gone}
            skill.usage = {one: shares for one, shares in skill.usage.items() if one not in gone}
        self.gate.forget(column)

    def merge_experts(self, name: str, other: str, column: int, other_column: int) -> None:
        """Gives the skills of one expert, and its column of the router, to another one."""
        for skill in self.skills:
            skill.expert = name if skill.expert == other else skill.expert
            for shares in skill.usage.values():
                if other in shares:
                    shares[name] = shares.get(name, 0.0) + shares.pop(other)
        self.gate.merge(column, other_column)

    def write_files(self, folder: Path) -> None:
        """Writes the library's files into a folder that is the caller's to make whole."""
        tensors = {f"gate.{name}": tensor for name, tensor in self.gate.state().items()}
        for index, looks in enumerate(self._looks):
            tensors |= {f"{kind}.{index}": rows for kind, rows in looks._asdict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
        description = _Description(ridge=self.gate.ridge, skills=self.skills)
        (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, experts: Sequence[str] | None = None) -> "SkillLibrary":
        """Reads the library of a checkpoint.

        Args:
            folder: The checkpoint.
            experts: Names of the model's experts, which those of the skills must be among; not checked by default.

        Raises:
            CheckpointError: There is none, it is damaged, or it speaks of other experts.
        """
        file = folder / DESCRIPTION_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no skills: it was not made by acquire, which writes {DESCRIPTION_FILE}"
            )
        try:
            description = _Description.model_validate_json(file.read_bytes())
            tensors = load_file(folder / TENSORS_FILE)
            self = cls(tensors["gate.gram"].shape[0], description.ridge)
            self.gate.load({name: tensors[f"gate.{name}"] for name in self.gate.state()})
            for index, skill in enumerate(description.skills):
                self.add(skill, *(tensors[f"{kind}.{index}"] for kind in _Looks._fields))
        except (OSError, SafetensorError, ValidationError, KeyError, ValueError) as error:
            raise CheckpointError(f"the skills in {folder} cannot be read: {first_line(error)}") from error
        for skill in self.skills:
            if experts is not None and skill.expert not in experts:
                raise CheckpointError(
                    f"{file} gives skill {skill.name!r} to the expert {skill.expert!r}, which the checkpoint has not"
                )
        return self


def save_with_skills(model: DyLoRA_MoE, library: SkillLibrary, path: Path) -> None:
    """Writes a checkpoint and its skills as one: a reader finds the old pair or the new one.

    Raises:
        CheckpointError: It could not be written.
    """
    with atomic_directory(path, marker=checkpoint.DESCRIPTION_FILE) as folder:
        model.write_files(folder, beside=path)
        library.write_files(folder)
