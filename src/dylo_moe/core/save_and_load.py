"""Save a mixture to a folder and load one: its files, its options, and the place of its base model."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dylo_moe.core import checkpoint
from dylo_moe.core.base import (
    DTYPES,
    EMBEDDED,
    fingerprint,
    folder_of,
    is_hub_id,
    is_offloaded,
    load_base_model,
    local_tokenizer,
    portable_name,
    same_base_model,
    state_in_place,
)
from dylo_moe.core.configuration import MODELING_FILE, MODELING_SOURCE, DyLoRAConfig, folder_config
from dylo_moe.core.lora import ExpertManager, hold_constant
from dylo_moe.core.output import AuxLossWeights
from dylo_moe.core.parts import Parts, RouterSpec, build_parts
from dylo_moe.core.routing import SUM_TO_ONE
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError

if TYPE_CHECKING:
    from dylo_moe.core.model import DyLoRA_MoE

_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINED_FILE, TRAINED_INDEX = "trained.safetensors", "model.safetensors.index.json"
"""Files that the Trainer of transformers resumes from, with the keys of ``state_dict``."""

_OURS = (
    checkpoint.EXPERTS_FOLDER,
    checkpoint.ROUTER_FILE,
    checkpoint.DESCRIPTION_FILE,
    checkpoint.CARD_FILE,
    "config.json",
    MODELING_FILE,
    "generation_config.json",
    TRAINED_FILE,
    TRAINED_INDEX,
    "model.safetensors",
    "adapter_config.json",
    "skills.json",
    "skills.safetensors",
)
"""Files that a save replaces or removes: ours, now or from an earlier version, and those of another kind of model."""

_NO_EFFECT = ("max_shard_size", "save_function", "save_peft_format", "save_original_format", "token")
_DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
_UPLOAD_OPTIONS = (
    "repo_id",
    "commit_message",
    "private",
    "token",
    "revision",
    "create_pr",
    "commit_description",
    "tags",
)
_LOADER_OPTIONS = ("adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "weights_only")


def save(
    model: "DyLoRA_MoE",
    folder: Path,
    is_main_process: bool,
    state: Mapping[str, Tensor] | None,
    in_place: bool,
    push_to_hub: bool,
    options: dict[str, Any],
) -> None:
    """Write a mixture's folder; see ``DyLoRA_MoE.save_pretrained`` for the arguments."""
    hub = {name: options.pop(name) for name in _UPLOAD_OPTIONS if name in options}
    _check_options(options)
    if not is_main_process:
        return
    if state is None and is_offloaded(model):
        state = state_in_place(model)
    with atomic_directory(folder, marker=checkpoint.DESCRIPTION_FILE, in_place=in_place, ours=_OURS) as target:
        write_files(model, target, state, final_folder=folder)
        if _TRAINER_CHECKPOINT.fullmatch(folder.name):
            _write_trained(model, target, state)
    _name_model(model, folder)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub)
    elif hub.keys() - {"token"}:
        raise CheckpointError(f"{', '.join(sorted(hub))} of save_pretrained are for push_to_hub=True; leave them out")


def _check_options(options: dict[str, Any]) -> None:
    if not options.pop("safe_serialization", True):
        raise CheckpointError("a mixture is saved as safetensors only; leave out safe_serialization=False")
    if options.pop("variant", None) is not None:
        raise CheckpointError("a mixture has no variants; leave out variant=")
    unknown = sorted(options.keys() - set(_NO_EFFECT))
    if unknown:
        raise TypeError(f"save_pretrained() got an unexpected keyword argument {unknown[0]!r}")


def write_files(
    model: "DyLoRA_MoE", folder: Path, state: Mapping[str, Tensor] | None = None, *, final_folder: Path | None = None
) -> None:
    """Write the files of a mixture into a folder that the caller makes atomic.

    Args:
        model: The mixture.
        folder: Empty folder.
        state: Whole tensors with the keys of ``state_dict``, if the model holds shards.
        final_folder: Path that ``folder`` will be renamed to; ``folder`` by default.
    """
    adapters, router = None, model.router.state_dict()
    if state is not None:
        adapters, router = _with_prefix("model.", state), _with_prefix("router.", state)
    description = describe(model, final_folder or folder)
    checkpoint.write_files(folder, model.model, router, description, adapters)
    config = folder_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / MODELING_FILE).write_text(MODELING_SOURCE)
    model.generation_config.save_pretrained(str(folder))
    if model.tokenizer is None:
        model.tokenizer = local_tokenizer(model.base_name, model.revision)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))


def _write_trained(model: "DyLoRA_MoE", folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write the trained tensors with the keys of ``state_dict``, for the Trainer of transformers."""
    whole = model.state_dict() if state is None else state
    trained = {
        name: value.contiguous() for name, value in whole.items() if "lora_" in name or name.startswith("router.")
    }
    save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(trained, TRAINED_FILE)}
    (folder / TRAINED_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def describe(model: "DyLoRA_MoE", folder: Path) -> checkpoint.MixtureConfig:
    """Return the contents of ``dylo_moe.json`` for a mixture that is saved in ``folder``."""
    router, base_name = model.router, model.base_name
    entries = [
        checkpoint.ExpertRecord(
            name=name,
            maturity=maturity,
            frozen=name in model.experts.frozen,
            pissa=name in model.experts.pissa_experts,
        )
        for name, maturity in zip(model.experts.names, router.maturity, strict=True)
    ]
    shared = model.experts.shared
    return checkpoint.MixtureConfig(
        dylo_moe_version=version("dylora-moe"),
        base_model=checkpoint.BaseModelRecord(
            name=base_name,
            revision=model.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            fingerprint=model._fingerprint,
            # relative as well, so that mixture and base model can be moved together
            from_here=os.path.relpath(base_name, folder.resolve()) if Path(base_name).is_absolute() else None,
        ),
        experts=entries,
        shared=shared and checkpoint.SharedExpertRecord(name=shared, frozen=shared in model.experts.frozen),
        routing=checkpoint.RoutingRecord(
            mode=model.routing,
            top_k=router.top_k,
            temperature=router.temperature,
            experts_per_layer=model.experts.experts_per_block,
            expert_scale=router.expert_scale,
        ),
        losses=checkpoint.LossRecord(**asdict(model.losses)),
        prompt_template=model.prompt_template,
        route=model.route,
    )


def load(
    cls: "type[DyLoRA_MoE]", source: str | Path, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> Any:
    """Load a mixture; see ``DyLoRA_MoE.from_pretrained`` for the arguments."""
    with_info = options.pop("output_loading_info", False)
    hub = {name: options.pop(name) for name in _DOWNLOAD_OPTIONS if name in options}
    path = folder_of(source, revision=options.pop("revision", None), subfolder=options.pop("subfolder", ""), **hub)
    config = options.pop("config", None)
    if config is not None and not isinstance(config, DyLoRAConfig):
        raise CheckpointError(
            f"the folder {path} is a mixture, and `config` is a {type(config).__name__}; leave it out, or pass the "
            "result of AutoConfig.from_pretrained for the folder"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None:  # AutoConfig has taken the argument
        options.setdefault("attn_implementation", attention)
    description = checkpoint.read_description(path)
    model = cls(_read_parts(path, description, given, options))
    _set_router(model, checkpoint.read_router(path, model.router.state_dict()), description)
    model.route = description.route
    model.experts.freeze(*(expert.name for expert in description.records if expert.frozen))
    hold_constant(model.experts, [expert.name for expert in description.experts if expert.pissa])
    _name_model(model, path)
    model.train(False)
    info: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, info) if with_info else model


def _read_parts(
    path: Path, description: checkpoint.MixtureConfig, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> Parts:
    base, name, revision = load_base_of(path, description.base_model, given, _base_options(options))
    names, routing = [expert.name for expert in description.experts], description.routing

    def add_experts(experts: ExpertManager) -> None:
        for expert in names:
            experts.import_adapter(path / checkpoint.EXPERTS_FOLDER / expert, expert)
        if (shared := description.shared) is not None:
            experts.import_adapter(path / checkpoint.EXPERTS_FOLDER / shared.name, shared.name, shared=True)

    return build_parts(
        ExpertManager(base),
        len(names),
        add_experts,
        RouterSpec(routing.mode, routing.top_k, routing.temperature, routing.experts_per_layer, routing.expert_scale),
        base_name=name,
        revision=revision,
        loss_weights=AuxLossWeights(**description.losses.model_dump()),
        prompt_template=description.prompt_template,
    )


def _set_router(model: "DyLoRA_MoE", state: dict[str, Tensor], description: checkpoint.MixtureConfig) -> None:
    model.router.load_state_dict(state)
    for expert in description.experts:
        model.set_maturity(expert.maturity, [expert.name])


def _base_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for loading the base model, without those that loaders of transformers add."""
    for name in [name for name in options if name.startswith("_") or name in _LOADER_OPTIONS]:
        options.pop(name)
    dtype = options.pop("torch_dtype", None)
    dtype = options.pop("dtype", None) or dtype
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), dtype)
    return {**options, "dtype": None if dtype == "auto" else dtype}


def load_base_of(
    path: Path, entry: checkpoint.BaseModelRecord, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, str, str | None]:
    """Return the base model of a checkpoint, its name and its revision.

    Args:
        path: The checkpoint.
        entry: The base model according to the checkpoint.
        given: Another place of the base model, or the loaded model.
        options: Passed to ``load_base_model``.

    Raises:
        CheckpointError: The base model is not in the checkpoint's place, or is another one.
        ModelError: The base model cannot be loaded.
    """
    if isinstance(given, PreTrainedModel):
        base, name, revision = given, entry.name, entry.revision
    else:
        place, revision = locate_base(path, entry, given)
        options = {**options, "dtype": options.get("dtype") or DTYPES[entry.dtype]}
        base = load_base_model(place, revision=revision, **options)
        name, revision = portable_name(place, revision)
    if not same_base_model(fingerprint(base), entry.fingerprint):
        raise CheckpointError(
            f"the checkpoint {path} belongs to the base model {entry.name!r}, and "
            f"{type(base).__name__} {given if isinstance(given, str) else name!r} is another one"
        )
    return base, name, revision


def locate_base(path: Path, entry: checkpoint.BaseModelRecord, given: str | None = None) -> tuple[str, str | None]:
    """Return a name or folder that loads a mixture's base model now, and its revision.

    If none is given, it is that of the checkpoint. A folder may have been moved together with the checkpoint.

    Raises:
        CheckpointError: The base model's folder is gone, or the base model was never in a folder.
    """
    if given is not None:
        return given, entry.revision if given == entry.name else None
    if not entry.name:
        raise CheckpointError(
            f"the checkpoint {path} was made on a base model in memory; pass that as `model` (`base_model` on the "
            "command line)"
        )
    if entry.name == EMBEDDED or is_hub_id(entry.name) or Path(entry.name).is_dir():
        return entry.name, entry.revision
    if entry.from_here is not None and (moved := (path.resolve() / entry.from_here)).is_dir():
        return str(moved.resolve()), None
    raise CheckpointError(
        f"the base model of the checkpoint {path} was in {entry.name}, which is not there any more; pass its folder as "
        "`model` (`base_model` on the command line)"
    )


def load_weights(model: "DyLoRA_MoE", path: Path) -> None:
    """Load the weights of a checkpoint into a mixture; see ``DyLoRA_MoE.load_weights``."""
    description = checkpoint.read_description(path)
    theirs = (description.adapters, _routing_text(description.routing.mode, description.routing.expert_scale))
    ours = (model.experts.adapters, _routing_text(model.routing, model.router.expert_scale))
    if theirs != ours:
        raise CheckpointError(
            f"the checkpoint {path} has experts {', '.join(theirs[0])} under routing {theirs[1]}, and this run "
            f"has {', '.join(ours[0])} under {ours[1]}; give the options of the run that wrote it"
        )
    if not same_base_model(model._fingerprint, description.base_model.fingerprint):
        raise CheckpointError(f"the checkpoint {path} belongs to another base model, {description.base_model.name!r}")
    router = checkpoint.read_router(path, model.router.state_dict())
    folders = {name: path / checkpoint.EXPERTS_FOLDER / name for name in model.experts.adapters}
    for name, folder in folders.items():
        model.experts.read_matching_weights(name, folder)
    # everything fits; until here nothing was changed
    for name, folder in folders.items():
        model.experts.load_weights(name, folder)
    _set_router(model, router, description)


def _routing_text(mode: str, expert_scale: str) -> str:
    return mode if expert_scale == SUM_TO_ONE else f"{mode} with expert_scale {expert_scale}"


def _name_model(model: "DyLoRA_MoE", folder: Path) -> None:
    """Set the path by which tools load a second copy, so that they find the mixture and not its bare base."""
    model.config._name_or_path = model.name_or_path = str(folder.absolute())
    if model.tokenizer is None and (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(str(folder))


def _with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
