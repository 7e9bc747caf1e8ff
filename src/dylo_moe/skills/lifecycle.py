"""Looking after the experts of a checkpoint: list, rename, freeze, remove, merge; on the disk, without base weights.

Each change writes the whole folder anew and puts it in the place of the old one, so that no reader sees half of it.
What the router knew is kept column by column; with skills, it is solved from their sums.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core import checkpoint
from dylo_moe.core.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_weights
from dylo_moe.core.base_model import module_names
from dylo_moe.core.checkpoint import Description
from dylo_moe.core.expert import check_new_name
from dylo_moe.errors import ExpertError, did_you_mean
from dylo_moe.skills.library import DESCRIPTION_FILE, SkillLibrary

_A, _B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class ExpertFacts:
    """What a checkpoint says of one expert.

    Attributes:
        name: Its name.
        rank: Its rank.
        parameters: How many it has, counted.
        maturity: 0 (young) or 1 (mature).
        frozen: Whether it is not trained any further.
    """

    name: str
    rank: int
    parameters: int
    maturity: int
    frozen: bool


def list_experts(path: Path) -> list[ExpertFacts]:
    """The experts of a checkpoint, in the order of the router's columns.

    Raises:
        CheckpointError: There is none, or it is not whole.
    """
    found = []
    for expert in checkpoint.read_description(path).experts:
        folder = path / checkpoint.EXPERTS_FOLDER / expert.name
        size = sum(tensor.numel() for tensor in read_weights(folder).values())
        found.append(ExpertFacts(expert.name, _config(folder)["r"], size, expert.maturity, expert.frozen))
    return found


def library_of(path: Path) -> SkillLibrary | None:
    """The skills of a checkpoint, where it has any."""
    if not (path / DESCRIPTION_FILE).is_file():
        return None
    return SkillLibrary.load(path, [expert.name for expert in checkpoint.read_description(path).experts])


def rename_expert(path: Path, old: str, new: str) -> None:
    """Gives an expert another name, in the mixture and in its skills.

    Raises:
        ExpertError: There is no such expert, or the new name is taken or not usable.
        ModelError: The base model's configuration cannot be had.
    """
    description, library = _opened(path, old)
    base = description.base_model
    # a base that was made in memory has no name: what is known of its modules stands in the experts' keys
    modules = module_names(base.name, revision=base.revision) if base.name else read_weights(_expert(path, old))
    check_new_name(new, _names(description), modules)
    for expert in description.experts:
        expert.name = new if expert.name == old else expert.name
    for skill in library.skills if library else []:
        skill.expert = new if skill.expert == old else skill.expert
        skill.usage = {one: {new if e == old else e: v for e, v in u.items()} for one, u in skill.usage.items()}
    with _rewritten(path, description, library) as folder:
        shutil.copytree(_expert(path, old), _expert(folder, new))


def freeze_expert(path: Path, name: str, frozen: bool = True) -> None:
    """Sees to it that no later skill trains an expert any further, or lifts that.

    Raises:
        ExpertError: There is no such expert.
    """
    description, library = _opened(path, name)
    for expert in description.experts:
        expert.frozen = frozen if expert.name == name else expert.frozen
    with _rewritten(path, description, library):
        pass


def remove_expert(path: Path, name: str) -> None:
    """Removes an expert, its column of the router, and the skills that it learned.

    Raises:
        ExpertError: There is no such expert, or no other one.
    """
    description, library = _opened(path, name)
    gone = _names(description).index(name)
    _drop_column(description, gone)
    if library is not None:
        library.remove_expert(name, gone)
    with _rewritten(path, description, library, without=gone):
        pass


def merge_experts(path: Path, one: str, other: str) -> None:
    """Makes one expert, under the first one's name, that adds to the base exactly what both of them add.

    ``B1 A1 + B2 A2`` is ``[B1 B2] [A1; A2]``: the ranks add up, and the scalings go into ``B``. The router sends it
    what it sent either.

    Raises:
        ExpertError: There is no such expert, or the two adapt different modules.
    """
    description, library = _opened(path, one)
    _check_known(description, other)
    folders = [_expert(path, name) for name in (one, other)]
    weights, config = _sum([(read_weights(folder), _config(folder)) for folder in folders], (one, other))
    kept, gone = (_names(description).index(name) for name in (one, other))
    _drop_column(description, gone)
    if library is not None:
        library.merge_experts(one, other, kept, gone)
    with _rewritten(path, description, library, without=gone, anew=one) as folder:
        target = _expert(folder, one)
        target.mkdir(parents=True)
        save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _sum(
    parts: list[tuple[dict[str, Tensor], dict[str, Any]]], names: tuple[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of an adapter that adds what all parts add."""
    (first, config), *others = parts
    if any(set(weights) != set(first) for weights, _ in others):
        raise ExpertError(f"the experts {' and '.join(names)} adapt different modules, and cannot be merged")
    merged = {}
    for key in first:
        tensors = [weights[key] * (_scaling(its) if _B in key else 1.0) for weights, its in parts]
        merged[key] = torch.cat(tensors, dim=0 if _A in key else 1).contiguous()
    rank = sum(its["r"] for _, its in parts)
    return merged, {**config, "r": rank, "lora_alpha": rank, "use_rslora": False}


def _scaling(config: dict[str, Any]) -> float:
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ExpertError("experts with ranks of their own for some modules cannot be merged")
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


@contextmanager
def _rewritten(
    path: Path,
    description: Description,
    library: SkillLibrary | None,
    *,
    without: int | None = None,
    anew: str | None = None,
) -> Iterator[Path]:
    """A folder to take the place of ``path``, with all that did not change; the block adds what did."""
    router = load_file(path / checkpoint.ROUTER_FILE)
    if without is not None:
        router = {key: _without(tensor, key, without) for key, tensor in router.items()}
    if library is not None and library.skills:
        router["gates.0"] = library.gate.weight().to(router["gates.0"])
    with checkpoint.atomic_directory(path, marker=checkpoint.DESCRIPTION_FILE) as folder:
        for name in _names(description):
            if _expert(path, name).is_dir() and name != anew:
                shutil.copytree(_expert(path, name), _expert(folder, name))
        save_file({key: tensor.contiguous() for key, tensor in router.items()}, folder / checkpoint.ROUTER_FILE)
        checkpoint.write_description(folder, description)
        if library is not None:
            library.write_files(folder)
        yield folder


def _without(tensor: Tensor, key: str, column: int) -> Tensor:
    dim = 0 if key.startswith("gates.") else 1
    kept = [index for index in range(tensor.shape[dim]) if index != column]
    return tensor.index_select(dim, torch.tensor(kept))


def _drop_column(description: Description, column: int) -> None:
    if len(description.experts) == 1:
        raise ExpertError(f"{description.experts[0].name!r} is the only expert; a mixture needs at least one")
    if description.routing.experts_per_layer is not None:
        raise ExpertError("a mixture with --experts_per_layer keeps its experts: its layers differ in what they carry")
    del description.experts[column]
    description.routing.top_k = min(description.routing.top_k, len(description.experts))


def _opened(path: Path, name: str) -> tuple[Description, SkillLibrary | None]:
    description = checkpoint.read_description(path)
    _check_known(description, name)
    return description, library_of(path)


def _check_known(description: Description, name: str) -> None:
    names = _names(description)
    if name not in names:
        raise ExpertError(f"there is no expert {name!r} (there are: {', '.join(names)}){did_you_mean(name, names)}")


def _names(description: Description) -> list[str]:
    return [expert.name for expert in description.experts]


def _expert(path: Path, name: str) -> Path:
    return path / checkpoint.EXPERTS_FOLDER / name


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    return config
