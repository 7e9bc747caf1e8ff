"""Edit the experts of a checkpoint: list, rename, freeze, remove, merge, export, import; on the disk.

Each change writes the folder's own files anew and puts them in the place of the old ones, so that no reader sees half
of it. Only an import reads the base model's weights: they tell whether it is the right one.
What the router knew is kept column by column; with skills, it is solved from their sums.
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

from dylo_moe.core import checkpoint
from dylo_moe.core.adapter_folder import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, read_config, read_weights
from dylo_moe.core.base_model import module_names
from dylo_moe.core.checkpoint import Description, ExpertEntry
from dylo_moe.core.decoder import find_decoder
from dylo_moe.core.expert import adapter_folder_of, check_import, check_new_name
from dylo_moe.core.plain_adapter import check_target, make_plain
from dylo_moe.core.router import YOUNG, DynamicHybridRouter
from dylo_moe.core.save_and_load import TRAINED_FILE, TRAINED_INDEX, base_of, place_of_base
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError, ExpertError, did_you_mean, first_line
from dylo_moe.routing_mode import RoutingMode
from dylo_moe.skills.library import DESCRIPTION_FILE, TENSORS_FILE, SkillLibrary

_A, _B = ".lora_A.", ".lora_B."
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
"""Files that a change writes anew, or, the last two, would leave wrong; all others stay as they are."""


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


@dataclass(frozen=True)
class ExportedAdapter:
    """What was exported.

    Attributes:
        rank: The rank of every tensor.
        alpha: Updates are scaled by ``alpha / rank``.
        trained_rank: The half of the rank that was trained, where the other half is PiSSA's constant; else None.
    """

    rank: int
    alpha: float
    trained_rank: int | None


def list_experts(path: Path) -> list[ExpertFacts]:
    """The experts of a checkpoint, in the order of the router's columns.

    Raises:
        CheckpointError: There is none, or it is not whole.
    """
    found = []
    for expert in checkpoint.read_description(path).experts:
        folder = path / checkpoint.EXPERTS_FOLDER / expert.name
        size = sum(tensor.numel() for tensor in read_weights(folder).values())
        found.append(ExpertFacts(expert.name, read_config(folder)["r"], size, expert.maturity, expert.frozen))
    return found


def library_of(path: Path) -> SkillLibrary | None:
    """The skills of a checkpoint, where it has any."""
    if not (path / DESCRIPTION_FILE).is_file():
        return None
    return SkillLibrary.load(path, [expert.name for expert in checkpoint.read_description(path).experts])


def rename_expert(path: Path, old: str, new: str, base_model: str | None = None) -> None:
    """Give an expert another name, in the mixture and in its skills.

    Args:
        path: The checkpoint.
        old: The expert.
        new: Its name from now on.
        base_model: Where the base is, if not where the checkpoint says.

    Raises:
        ExpertError: There is no such expert, or the new name is taken or not usable.
        ModelError: The base model's configuration cannot be had.
    """
    description, library = _opened(path, old)
    modules: Iterable[str] = read_weights(_expert(path, old))
    # a base that was made in memory has no name: what is known of its modules stands in the experts' keys
    if description.base_model.name or base_model is not None:
        place, revision = place_of_base(path, description.base_model, base_model)
        modules = module_names(place, revision=revision)
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
    weights, config = _sum([(read_weights(folder), read_config(folder)) for folder in folders], (one, other))
    for expert in description.experts:
        expert.pissa = expert.pissa and expert.name != one  # its halves are not halves any more
    kept, gone = (_names(description).index(name) for name in (one, other))
    _drop_column(description, gone)
    if library is not None:
        library.merge_experts(one, other, kept, gone)
    with _rewritten(path, description, library, without=gone, anew=one) as folder:
        target = _expert(folder, one)
        target.mkdir(parents=True)
        save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def export_expert(path: Path, name: str, folder: Path) -> ExportedAdapter:
    """Write an expert as a PEFT adapter folder that every tool scales alike; see ``core.plain_adapter``.

    Raises:
        ExpertError: There is no such expert, its files are damaged, or the folder is a part of the mixture.
        CheckpointError: The folder holds something else than an adapter, or cannot be written.
    """
    description, _ = _opened(path, name)
    if path.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ExpertError(f"the folder {folder} is a part of the mixture {path}; choose one outside it")
    check_target(folder)
    source = _expert(path, name)
    read_weights(source)
    trained = read_config(source)["r"]
    with atomic_directory(folder, marker=CONFIG_FILE) as target:
        for file in ADAPTER_FILES:
            shutil.copyfile(source / file, target / file)
        make_plain(target)
    config = read_config(folder)
    pissa = next(expert.pissa for expert in description.experts if expert.name == name)
    return ExportedAdapter(config["r"], config["lora_alpha"], trained // 2 if pissa else None)


def import_expert(
    path: Path,
    source: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    base_model: str | None = None,
) -> str:
    """Add an existing PEFT adapter to a checkpoint as a young expert, with a column of the router as a mixture adds it.

    Args:
        path: The checkpoint.
        source: A folder, or a Hub id.
        name: The expert's; that of the folder or the repository by default.
        revision: Commit, tag or branch of ``source`` on the Hub.
        base_model: Where the base is, if not where the checkpoint says.

    Returns:
        The expert's name.

    Raises:
        ExpertError: The adapter does not fit the base or cannot be routed, or the name is taken or not usable.
        CheckpointError: The checkpoint is not whole, or the adapter cannot be had.
        ModelError: The base model cannot be had.
    """
    description = checkpoint.read_description(path)
    library = library_of(path)
    folder, name = adapter_folder_of(source, revision), name or Path(source).absolute().name
    base, _, _ = base_of(path, description.base_model, base_model, {})
    layers = find_decoder(base).layers[RoutingMode.parse(description.routing.mode).first_expert_layer :]
    check_import(folder, name, base, layers, _names(description))
    description.experts.append(ExpertEntry(name=name, maturity=YOUNG))
    with _rewritten(path, description, library, grown=True, anew=name) as target:
        _expert(target, name).mkdir(parents=True)
        for file in ADAPTER_FILES:
            shutil.copyfile(folder / file, _expert(target, name) / file)
    return name


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
    grown: bool = False,
    anew: str | None = None,
) -> Iterator[Path]:
    """Give a folder to take the place of ``path``, with all that did not change; the block adds what did."""
    router = _router_of(path)
    if grown:
        router = _grown(router)
    if without is not None:
        router = {key: _without(tensor, key, without) for key, tensor in router.items()}
    if library is not None and library.skills:
        taught = library.gate.weight().to(router["gates.0"])
        router["gates.0"][: len(taught)] = taught  # an expert that no skill has claimed keeps its column
    with atomic_directory(path, marker=checkpoint.DESCRIPTION_FILE, ours=_REWRITTEN) as folder:
        for name in _names(description):
            if _expert(path, name).is_dir() and name != anew:
                shutil.copytree(_expert(path, name), _expert(folder, name))
        save_file({key: tensor.contiguous() for key, tensor in router.items()}, folder / checkpoint.ROUTER_FILE)
        checkpoint.write_description(folder, description)
        if library is not None:
            library.write_files(folder)
        yield folder


def _router_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path / checkpoint.ROUTER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / checkpoint.ROUTER_FILE} is damaged: {first_line(error)}") from error


def _grown(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a router's state with one more column, as ``DynamicHybridRouter.add_expert`` makes it."""
    gates, experts = state["expert_load"].shape
    router = DynamicHybridRouter(state["gates.0"].shape[1], experts, top_k=1, num_gates=gates)
    router.load_state_dict(state)
    router.add_expert()
    return router.state_dict()


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
