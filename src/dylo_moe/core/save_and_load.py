"""Between a mixture in memory and its folder: what is written, what is read, and where the base model comes from."""

import json
import logging
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dylo_moe.core import checkpoint
from dylo_moe.core.base_model import (
    DTYPES,
    EMBEDDED,
    fingerprint,
    load_base_model,
    local_tokenizer,
    name_of,
    same_base_model,
)
from dylo_moe.core.configuration import MODELING_FILE, MODELING_SOURCE, DyLoRAConfig, folder_config
from dylo_moe.core.expert import ExpertManager
from dylo_moe.core.hub import folder_of, is_hub_id
from dylo_moe.core.initialise import hold_constant
from dylo_moe.core.offload import is_offloaded, state_in_place
from dylo_moe.core.routing import make_router
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import CheckpointError
from dylo_moe.routing_mode import RoutingMode

if TYPE_CHECKING:
    from dylo_moe.core.model import DyLoRA_MoE

_LOG = logging.getLogger(__name__)

_TRAINERS_CHECKPOINT = re.compile(r"checkpoint-\d+")
TRAINED_FILE, TRAINED_INDEX = "trained.safetensors", "model.safetensors.index.json"
"""What the Trainer of transformers goes on from: only files of these names, with the keys of ``state_dict``."""

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
"""What a mixture's folder has of ours, now or from an earlier save, and what another kind of model would have."""

_NO_EFFECT = ("max_shard_size", "save_function", "save_peft_format", "save_original_format", "token")
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
_LOADERS_OWN = ("adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "weights_only")


def save(
    model: "DyLoRA_MoE",
    folder: Path,
    is_main_process: bool,
    state: Mapping[str, Tensor] | None,
    in_place: bool,
    push_to_hub: bool,
    options: dict[str, Any],
) -> None:
    """Write a mixture's folder; ``DyLoRA_MoE.save_pretrained`` says what the arguments mean."""
    hub = {name: options.pop(name) for name in (*_HUB_UPLOAD,) if name in options}
    _check_options(options)
    if not is_main_process:
        return
    if state is None and is_offloaded(model):
        state = state_in_place(model)
    in_trainers_checkpoint = _TRAINERS_CHECKPOINT.fullmatch(folder.name) is not None
    marker = checkpoint.DESCRIPTION_FILE
    with atomic_directory(folder, marker=marker, in_place=in_place, ours=_OURS) as target:
        write_files(model, target, state, beside=folder)
        if in_trainers_checkpoint:
            _write_trained(model, target, state)
    name_model(model, folder)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub)
    elif hub.keys() - {"token"}:
        raise CheckpointError(f"{', '.join(sorted(hub))} of save_pretrained are for push_to_hub=True; leave them out")


_HUB_UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "commit_description", "tags")


def _check_options(options: dict[str, Any]) -> None:
    if not options.pop("safe_serialization", True):
        raise CheckpointError("a mixture is saved as safetensors only; leave out safe_serialization=False")
    if options.pop("variant", None) is not None:
        raise CheckpointError("a mixture has no variants; leave out variant=")
    unknown = sorted(options.keys() - {*_NO_EFFECT})
    if unknown:
        raise TypeError(f"save_pretrained() got an unexpected keyword argument {unknown[0]!r}")


def write_files(
    model: "DyLoRA_MoE", folder: Path, state: Mapping[str, Tensor] | None = None, *, beside: Path | None = None
) -> None:
    """Write the files of a mixture into a folder that is the caller's to make whole.

    Args:
        model: The mixture.
        folder: Empty.
        state: Whole tensors as in ``state_dict``, where the model holds parts.
        beside: Where the folder will be.
    """
    adapters, router = None, model.router.state_dict()
    if state is not None:
        adapters, router = _beginning_with("model.", state), _beginning_with("router.", state)
    description = describe(model, beside or folder)
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
    """Write what trains under the names of ``state_dict``, for a Trainer that knows nothing of mixtures."""
    whole = model.state_dict() if state is None else state
    trained = {
        name: value.contiguous() for name, value in whole.items() if "lora_" in name or name.startswith("router.")
    }
    save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(trained, TRAINED_FILE)}
    (folder / TRAINED_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def describe(model: "DyLoRA_MoE", folder: Path) -> checkpoint.Description:
    """Return what a mixture's folder says of itself."""
    router = model.router
    entries = [
        checkpoint.ExpertEntry(
            name=name,
            maturity=maturity,
            frozen=name in model.experts.frozen,
            pissa=name in model.experts.held,
        )
        for name, maturity in zip(model.experts.names, router.maturity, strict=True)
    ]
    return checkpoint.Description(
        dylo_moe_version=version("dylora-moe"),
        base_model=checkpoint.BaseModelEntry(
            name=model.base_name,
            revision=model.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            fingerprint=model._fingerprint,
            from_here=_from_here(model.base_name, folder),
        ),
        experts=entries,
        routing=checkpoint.RoutingEntry(
            mode=model.routing,
            top_k=router.top_k,
            temperature=router.temperature,
            experts_per_layer=model.experts.blocks,
        ),
        losses=model.losses,
        prompt_template=model.prompt_template,
    )


def _from_here(name: str, folder: Path) -> str | None:
    """Return the way from a mixture's folder to a base model's, so that both can be moved together."""
    return os.path.relpath(name, folder.resolve()) if Path(name).is_absolute() else None


def load(
    cls: "type[DyLoRA_MoE]", source: str | Path, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> Any:
    """Load a mixture; ``DyLoRA_MoE.from_pretrained`` says what the arguments mean."""
    with_info = options.pop("output_loading_info", False)
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    path = folder_of(source, revision=options.pop("revision", None), subfolder=options.pop("subfolder", ""), **hub)
    config = options.pop("config", None)
    if config is not None and not isinstance(config, DyLoRAConfig):
        raise CheckpointError(
            f"the folder {path} is a mixture, and config is a {type(config).__name__}; leave config out, or pass what "
            "AutoConfig.from_pretrained gives for the folder"
        )
    description = checkpoint.read_description(path)
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None:  # AutoConfig has taken the argument
        options.setdefault("attn_implementation", attention)
    base, name, revision = base_of(path, description.base_model, given, _base_options(options))
    routing = description.routing
    experts = ExpertManager(base)
    mode = RoutingMode.parse(routing.mode, len(experts.decoder.layers))
    router = make_router(
        experts, mode, len(description.experts), routing.top_k, routing.temperature, routing.experts_per_layer
    )
    experts.carry_on(mode.first_expert_layer, routing.experts_per_layer)
    for expert in description.experts:
        experts.import_adapter(path / checkpoint.EXPERTS_FOLDER / expert.name, expert.name)
    self = cls.__new__(cls)
    self._assemble(name, revision, mode, experts, router, description.losses, description.prompt_template)
    self.router.load_state_dict(checkpoint.read_router(path, self.router.state_dict()))
    self.router.maturity = [expert.maturity for expert in description.experts]
    self.experts.freeze(*(expert.name for expert in description.experts if expert.frozen))
    hold_constant(self.experts, [expert.name for expert in description.experts if expert.pissa])
    name_model(self, path)
    self.train(False)
    return (self, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}) if with_info else self


def _base_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for loading the base model, without those that transformers' own loaders add."""
    for name in [name for name in options if name.startswith("_") or name in _LOADERS_OWN]:
        options.pop(name)
    dtype = options.pop("torch_dtype", None)
    dtype = options.pop("dtype", None) or dtype
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), dtype)
    return {**options, "dtype": None if dtype == "auto" else dtype}


def base_of(
    path: Path, entry: checkpoint.BaseModelEntry, given: str | PreTrainedModel | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, str, str | None]:
    """Return the base model of a checkpoint, its name and its revision; what the caller gives comes first.

    Raises:
        CheckpointError: It is not where the checkpoint says, or is another one.
        ModelError: It cannot be had.
    """
    if isinstance(given, PreTrainedModel):
        base, name, revision = given, entry.name, entry.revision
    else:
        place, revision = place_of_base(path, entry, given)
        base = load_base_model(
            place, revision=revision, **{**options, "dtype": options.get("dtype") or DTYPES[entry.dtype]}
        )
        name, revision = name_of(place, revision)
    if not same_base_model(fingerprint(base), entry.fingerprint):
        raise CheckpointError(
            f"the checkpoint {path} belongs to the base model {entry.name!r}, and "
            f"{type(base).__name__} {given if isinstance(given, str) else name!r} is another one"
        )
    return base, name, revision


def place_of_base(path: Path, entry: checkpoint.BaseModelEntry, given: str | None = None) -> tuple[str, str | None]:
    """Return where a mixture's base model is now, and its revision: what is given, else what the mixture says.

    A folder is where it was, or as far from the mixture as it was.

    Raises:
        CheckpointError: It was in a folder and is in neither place, or it was in memory.
    """
    if given is not None:
        return given, entry.revision if given == entry.name else None
    if not entry.name:
        raise CheckpointError(
            f"the checkpoint {path} was made on a base model in memory; pass that as model= (on the command line: "
            "--base_model)"
        )
    if entry.name == EMBEDDED or is_hub_id(entry.name) or Path(entry.name).is_dir():
        return entry.name, entry.revision
    if entry.from_here is not None and (moved := (path.resolve() / entry.from_here)).is_dir():
        return str(moved.resolve()), None
    raise CheckpointError(
        f"the base model of the checkpoint {path} was in {entry.name}, which is not there any more; say where it is by "
        "model= (on the command line: --base_model)"
    )


def load_weights(model: "DyLoRA_MoE", path: Path) -> None:
    """Load the weights of a checkpoint into a mixture; ``DyLoRA_MoE.load_weights`` says more."""
    description = checkpoint.read_description(path)
    theirs = ([expert.name for expert in description.experts], description.routing.mode)
    ours = (model.experts.names, model.routing)
    if theirs != ours:
        raise CheckpointError(
            f"the checkpoint {path} has experts {', '.join(theirs[0])} under routing {theirs[1]}, and this run "
            f"has {', '.join(ours[0])} under {ours[1]}; give the flags of the run that wrote it"
        )
    if not same_base_model(model._fingerprint, description.base_model.fingerprint):
        raise CheckpointError(f"the checkpoint {path} belongs to another base model, {description.base_model.name!r}")
    router = checkpoint.read_router(path, model.router.state_dict())
    folders = {name: path / checkpoint.EXPERTS_FOLDER / name for name in model.experts.names}
    for name, folder in folders.items():
        model.experts.fitting_weights(name, folder)
    # all of it fits: a checkpoint that does not has changed nothing
    for name, folder in folders.items():
        model.experts.load_weights(name, folder)
    model.router.load_state_dict(router)
    model.router.maturity = [expert.maturity for expert in description.experts]


def name_model(model: "DyLoRA_MoE", folder: Path) -> None:
    """Let tools that load a second copy of a model find the mixture, and not its bare base."""
    model.config._name_or_path = model.name_or_path = str(folder.absolute())
    if model.tokenizer is None and (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(str(folder))


def _beginning_with(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
