"""Edits of the experts of a checkpoint on the disk: list, rename, freeze, remove, merge, export, import.

Each change writes a new folder that replaces the old one in one step, so no reader sees half of it. Only an import
loads the weights of the base model, to check that the adapter fits them. The columns of the router are kept; with
skills, they are solved from the skills' sums.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylo_moe.core import (
    ADAPTER_FILES,
    CONFIG_FILE,
    TRAINED_FILE,
    TRAINED_INDEX,
    WEIGHTS_FILE,
    YOUNG,
    DynamicHybridRouter,
    ExpertRecord,
    MixtureConfig,
    adapter_folder_of,
    check_import,
    check_new_name,
    check_target,
    checkpoint,
    find_decoder,
    load_base_of,
    locate_base,
    make_plain,
    module_names,
    read_config,
    read_weights,
)
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError, ExpertError, did_you_mean, first_line
from dylo_moe.skills.library import DESCRIPTION_FILE, TENSORS_FILE, SkillLibrary
from dylo_moe.spec import RoutingMode

_A, _B = ".lora_A.", ".lora_B."
_Adapter = tuple[dict[str, Tensor], dict[str, Any]]
_REWRITTEN = (
    checkpoint.EXPERTS_FOLDER,
    checkpoint.ROUTER_FILE,
    checkpoint.DESCRIPTION_FILE,
    checkpoint.CARD_FILE,
    DESCRIPTION_FILE,
    TENSORS_FILE,
    TRAINED_FILE,
    TRAINED_INDEX,
)
"""Files that a change writes again or, the last two, removes because they would be wrong; all others are kept."""


@dataclass(frozen=True)
class ExpertFacts:
    """Facts about one expert of a checkpoint.

    Attributes:
        name: Name of the expert.
        rank: Rank of its adapter.
        parameters: Number of its parameters.
        maturity: 0 (young) or 1 (mature); None for the shared expert, which the router does not know.
        frozen: Whether it is excluded from further training.
    """

    name: str
    rank: int
    parameters: int
    maturity: int | None
    frozen: bool


@dataclass(frozen=True)
class ExportedAdapter:
    """Facts about an exported adapter.

    Attributes:
        rank: Rank of every tensor.
        alpha: The ``lora_alpha``; updates are scaled by ``alpha / rank``.
        trained_rank: Half of the rank if the other half is the constant part of PiSSA, else None.
    """

    rank: int
    alpha: float
    trained_rank: int | None


def list_experts(path: Path) -> list[ExpertFacts]:
    """Return the experts of a checkpoint in the order of the router's columns, the shared one last.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
    """
    found = []
    for expert in checkpoint.read_description(path).records:
        folder = _expert(path, expert.name)
        size = sum(tensor.numel() for tensor in read_weights(folder).values())
        maturity = expert.maturity if isinstance(expert, ExpertRecord) else None
        found.append(ExpertFacts(expert.name, read_config(folder)["r"], size, maturity, expert.frozen))
    return found


def read_library(path: Path) -> SkillLibrary | None:
    """Return the skills of a checkpoint, or None if it has none.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete, or its skills cannot be read.
    """
    if not (path / DESCRIPTION_FILE).is_file():
        return None
    return SkillLibrary.load(path, [expert.name for expert in checkpoint.read_description(path).experts])


def rename_expert(path: Path, old: str, new: str, base_model: str | None = None) -> None:
    """Rename an expert in the mixture and in its skills.

    Args:
        path: Folder of the checkpoint.
        old: Name of the expert.
        new: New name.
        base_model: Folder or Hub id of the base model; as in the checkpoint by default.

    Raises:
        ExpertError: The expert does not exist, or the new name is taken or not usable.
        ModelError: The configuration of the base model cannot be read.
    """
    description, library = _opened(path, old)
    modules: Iterable[str] = read_weights(_expert(path, old))
    # a base built in memory has no name; the experts' keys name those of its modules that they adapt
    if description.base_model.name or base_model is not None:
        location, revision = locate_base(path, description.base_model, base_model)
        modules = module_names(location, revision=revision)
    check_new_name(new, description.adapters, modules)
    for expert in description.records:
        expert.name = new if expert.name == old else expert.name
    for skill in library.skills if library else []:
        skill.expert = new if skill.expert == old else skill.expert
        skill.usage = {
            one: {new if expert == old else expert: share for expert, share in shares.items()}
            for one, shares in skill.usage.items()
        }
    with _rewritten(path, description, library) as folder:
        shutil.copytree(_expert(path, old), _expert(folder, new))


def freeze_expert(path: Path, name: str, frozen: bool = True) -> None:
    """Exclude an expert from further training, or include it again.

    Args:
        path: Folder of the checkpoint.
        name: Name of the expert.
        frozen: Whether later skills must not train it.

    Raises:
        ExpertError: The expert does not exist.
    """
    description, library = _opened(path, name)
    for expert in description.records:
        expert.frozen = frozen if expert.name == name else expert.frozen
    with _rewritten(path, description, library):
        pass


def remove_expert(path: Path, name: str) -> None:
    """Remove an expert, its column of the router, and the skills that it learned.

    Raises:
        ExpertError: The expert does not exist, or is the only one.
    """
    description, library = _opened(path, name)
    if description.shared is not None and description.shared.name == name:
        description.shared = None
        with _rewritten(path, description, library):
            return
    removed = _names(description).index(name)
    _drop_column(description, removed)
    if library is not None:
        library.remove_expert(name, removed)
    with _rewritten(path, description, library, removed=removed):
        pass


def merge_experts(path: Path, one: str, other: str) -> None:
    """Merge two experts into one, under the first one's name, whose update of the base is exactly the sum of theirs.

    ``B1 A1 + B2 A2`` is ``[B1 B2] [A1; A2]``: the ranks add up, and the scalings go into ``B``. The router sends the
    merged expert the tokens of both.

    Raises:
        ExpertError: An expert does not exist, or the two adapt different modules.
    """
    description, library = _opened(path, one)
    _check_known(description, other)
    if description.shared is not None and description.shared.name in (one, other):
        raise ExpertError(
            f"the shared expert {description.shared.name!r} is always on, and cannot be merged; remove it"
        )
    folders = [_expert(path, name) for name in (one, other)]
    weights, config = _sum([(read_weights(folder), read_config(folder)) for folder in folders], (one, other))
    for expert in description.experts:
        expert.pissa = expert.pissa and expert.name != one  # the constant is no longer half of the rank
    kept, removed = (_names(description).index(name) for name in (one, other))
    _drop_column(description, removed)
    if library is not None:
        library.merge_experts(one, other, kept, removed)
    with _rewritten(path, description, library, removed=removed, replaced=one) as folder:
        target = _expert(folder, one)
        target.mkdir(parents=True)
        save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def export_expert(path: Path, name: str, folder: Path) -> ExportedAdapter:
    """Write an expert as a PEFT adapter folder that every tool scales the same way; see ``plain_adapter``.

    Raises:
        ExpertError: The expert does not exist, its files are damaged, or ``folder`` is inside the mixture.
        CheckpointError: ``folder`` holds something other than an adapter, or cannot be written.
    """
    description, _ = _opened(path, name)
    if path.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ExpertError(f"the folder {folder} is a part of the mixture {path}; choose a folder outside it")
    check_target(folder)
    source = _expert(path, name)
    read_weights(source)
    trained = read_config(source)["r"]
    with atomic_directory(folder, marker=CONFIG_FILE) as target:
        for file in ADAPTER_FILES:
            shutil.copyfile(source / file, target / file)
        make_plain(target)
    config = read_config(folder)
    pissa = any(expert.pissa for expert in description.experts if expert.name == name)
    return ExportedAdapter(config["r"], config["lora_alpha"], trained // 2 if pissa else None)


def import_expert(
    path: Path,
    source: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    base_model: str | None = None,
) -> str:
    """Add a PEFT adapter to a checkpoint as a young expert, with a new column of the router.

    Args:
        path: Folder of the checkpoint.
        source: Folder or Hub id of the adapter.
        name: Name of the expert; that of the folder or the repository by default.
        revision: Commit, tag or branch of ``source`` on the Hub.
        base_model: Folder or Hub id of the base model; as in the checkpoint by default.

    Returns:
        The name of the expert.

    Raises:
        ExpertError: The adapter does not fit the base or cannot be routed, or the name is taken or not usable.
        CheckpointError: The checkpoint is incomplete, or the adapter cannot be read or fetched.
        ModelError: The base model cannot be loaded.
    """
    description = checkpoint.read_description(path)
    library = read_library(path)
    folder, name = adapter_folder_of(source, revision), name or Path(source).absolute().name
    base, _, _ = load_base_of(path, description.base_model, base_model, {})
    layers = find_decoder(base).layers[RoutingMode.parse(description.routing.mode).first_expert_layer :]
    check_import(folder, name, base, layers, description.adapters)
    description.experts.append(ExpertRecord(name=name, maturity=YOUNG))
    with _rewritten(path, description, library, added=True, replaced=name) as target:
        _expert(target, name).mkdir(parents=True)
        for file in ADAPTER_FILES:
            shutil.copyfile(folder / file, _expert(target, name) / file)
    return name


def _sum(parts: list[_Adapter], names: tuple[str, str]) -> _Adapter:
    """Return the tensors and the configuration of an adapter whose update is the sum of those of all parts."""
    (first, config), *others = parts
    if any(set(weights) != set(first) for weights, _ in others):
        raise ExpertError(f"the experts {' and '.join(names)} adapt different modules, and cannot be merged")
    scaled: list[tuple[dict[str, Tensor], float]] = []
    for weights, own in parts:
        if own.get("rank_pattern") or own.get("alpha_pattern"):
            raise ExpertError("experts with `rank_pattern` or `alpha_pattern` cannot be merged")
        scaled.append((weights, own["lora_alpha"] / (math.sqrt(own["r"]) if own.get("use_rslora") else own["r"])))
    merged = {}
    for key in first:
        tensors = [weights[key] * (scaling if _B in key else 1.0) for weights, scaling in scaled]
        merged[key] = torch.cat(tensors, dim=0 if _A in key else 1).contiguous()
    rank = sum(own["r"] for _, own in parts)
    return merged, {**config, "r": rank, "lora_alpha": rank, "use_rslora": False}


@contextmanager
def _rewritten(
    path: Path,
    description: MixtureConfig,
    library: SkillLibrary | None,
    *,
    removed: int | None = None,
    added: bool = False,
    replaced: str | None = None,
) -> Iterator[Path]:
    """Yield a folder that replaces ``path`` after the block, with all unchanged files; the block adds the others.

    Args:
        path: Folder of the checkpoint.
        description: MixtureConfig to write.
        library: Skills to write, if any.
        removed: Column to remove from the router.
        added: Whether to add a column to the router.
        replaced: Name of an expert whose files the block writes.
    """
    file = path / checkpoint.ROUTER_FILE
    try:
        router = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {first_line(error)}") from error
    if added:
        router = _with_column(router)
    if removed is not None:
        router = _without_column(router, removed)
    if library is not None and library.skills:
        solved = library.gate.weight().to(router["gates.0"])
        router["gates.0"][: len(solved)] = solved  # an expert without a skill keeps its column
    with atomic_directory(path, marker=checkpoint.DESCRIPTION_FILE, ours=_REWRITTEN) as folder:
        for name in description.adapters:
            if _expert(path, name).is_dir() and name != replaced:
                shutil.copytree(_expert(path, name), _expert(folder, name))
        save_file({key: tensor.contiguous() for key, tensor in router.items()}, folder / checkpoint.ROUTER_FILE)
        checkpoint.write_description(folder, description)
        if library is not None:
            library.write_files(folder)
        yield folder


def _with_column(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a router's state with one more column, as ``DynamicHybridRouter.add_expert`` adds it."""
    gates, experts = state["expert_load"].shape
    router = DynamicHybridRouter(state["gates.0"].shape[1], experts, top_k=1, num_gates=gates)
    router.load_state_dict(state)
    router.add_expert()
    return router.state_dict()


def _without_column(state: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """Return a router's state with one column less."""
    smaller = {}
    for key, tensor in state.items():
        dim = 0 if key.startswith("gates.") else 1
        kept = [index for index in range(tensor.shape[dim]) if index != column]
        smaller[key] = tensor.index_select(dim, torch.tensor(kept))
    return smaller


def _drop_column(description: MixtureConfig, column: int) -> None:
    if len(description.experts) == 1:
        raise ExpertError(f"{description.experts[0].name!r} is the only expert; a mixture needs at least one")
    if description.routing.experts_per_layer is not None:
        raise ExpertError("a mixture with `experts_per_layer` keeps its experts, as its layers have different ones")
    del description.experts[column]
    description.routing.top_k = min(description.routing.top_k, len(description.experts))


def _opened(path: Path, name: str) -> tuple[MixtureConfig, SkillLibrary | None]:
    description = checkpoint.read_description(path)
    _check_known(description, name)
    return description, read_library(path)


def _check_known(description: MixtureConfig, name: str) -> None:
    names = description.adapters
    if name not in names:
        raise ExpertError(f"there is no expert {name!r} (there are: {', '.join(names)}){did_you_mean(name, names)}")


def _names(description: MixtureConfig) -> list[str]:
    return [expert.name for expert in description.experts]


def _expert(path: Path, name: str) -> Path:
    return path / checkpoint.EXPERTS_FOLDER / name
