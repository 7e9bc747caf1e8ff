"""The experts of one base model: creating, choosing, freezing, importing and exporting them.

An expert is a PEFT adapter, no more. The order of ``ExpertManager.names`` is the order of the router's columns.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylo_moe.core.adapter_folder import (
    ADAPTER_FILES,
    CONFIG_FILE,
    PLAIN_INITIALISATIONS,
    check_adapter,
    difference,
    read_config,
    read_weights,
    scalings,
    tensor_shapes,
)
from dylo_moe.core.base_model import cached_repository
from dylo_moe.core.checkpoint import write_adapter
from dylo_moe.core.decoder import find_decoder
from dylo_moe.core.hub import folder_of
from dylo_moe.core.offload import is_offloaded, refuse_offloaded, state_in_place
from dylo_moe.core.plain_adapter import check_target, make_plain
from dylo_moe.core.quantised import keep_trainable
from dylo_moe.core.routed_lora import enable_routing
from dylo_moe.core.routing_state import RoutingState
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import ExpertError, ModelError, did_you_mean
from dylo_moe.routing_mode import RoutingMode

AUTO_TARGETS = ("q_proj", "v_proj", "k_proj", "o_proj", "query_key_value", "c_attn", "Wqkv")
"""Attention projections as the model families call them; an expert adapts those that the base model has."""

ALL_LINEAR = "all-linear"
_NAMES_IN_KEYS = {"weight", "bias", "base_layer", "lora_A", "lora_B", "base_model", "model"}


class ExpertManager:
    """Keeps the experts of a base model.

    Args:
        base_model: A causal LM; its parameters are frozen. The first expert wraps it in a ``PeftModel``.
        first_layer: The first decoder layer that may carry experts.
        blocks: How many experts, the first created ones, each block of layers carries; see ``carried_by_layers``. None
            for all.

    Attributes:
        decoder: The base model's backbone and decoder layers.
        held: Experts of which the second half of the ranks is a constant; see ``initialise.initialise_pissa``.

    Raises:
        ModelError: The base model carries adapters already.
    """

    def __init__(self, base_model: PreTrainedModel, first_layer: int = 0, blocks: Sequence[int] | None = None) -> None:
        carried = next((name for name, module in base_model.named_modules() if isinstance(module, LoraLayer)), None)
        if carried is not None:
            raise ModelError(f"the base model carries adapters already (at {carried}); unload them, or load it anew")
        base_model.requires_grad_(False)
        keep_trainable(base_model)
        self.base_model = base_model
        self.decoder = find_decoder(base_model)
        self.carry_on(first_layer, blocks)
        self.held: set[str] = set()
        self.names: list[str] = []
        self.active: list[str] = []
        self._active_indices: list[int] = []
        self.frozen: set[str] = set()
        self._peft_model: PeftModel | None = None
        self._state: RoutingState | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> LoraConfig:
        """Return an expert's PEFT configuration: its rank, scaling and target modules."""
        self.check_known([name])
        config = self.peft_model.peft_config[name]
        assert isinstance(config, LoraConfig)
        return config

    def carry_on(self, first_layer: int, blocks: Sequence[int] | None) -> None:
        """Set which layers carry the experts to come; see the class."""
        self.first_layer = first_layer
        self.blocks = None if blocks is None else list(blocks)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers that may carry experts."""
        return list(self.decoder.layers[self.first_layer :])

    @property
    def peft_model(self) -> PeftModel:
        """The base model with its adapters."""
        if self._peft_model is None:
            raise ExpertError("there is no expert yet; create or import one first")
        return self._peft_model

    @property
    def routing_state(self) -> RoutingState:
        """What the routed layers share."""
        if self._state is None:
            raise ExpertError("there is no expert yet; create or import one first")
        return self._state

    def create(
        self,
        name: str | None = None,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> str:
        """Creates an expert that changes nothing yet (``B`` is zero), and makes all experts active.

        Args:
            name: ``expert_N`` by default.
            rank: Rank of the update, at least 1.
            alpha: The update is scaled by ``alpha / rank``; ``2 * rank`` by default.
            dropout: Dropout on the expert's input while training, 0 up to but not including 1.
            target_modules: Names of linear modules, ``"all-linear"``, or None for the attention projections.
            use_rslora: Scale by ``alpha / sqrt(rank)`` instead (Kalajdzievski 2023).
            init_lora_weights: As in ``peft.LoraConfig``.

        Returns:
            The expert's name.

        Raises:
            ExpertError: The name is taken or not usable, or a number is out of its range.
            ModelError: The base model has none of the target modules, or is offloaded.
        """
        name = self._new_name(name)
        refuse_offloaded(self.base_model, "no expert can be made on it; make the mixture first, and offload that")
        if rank < 1:
            raise ExpertError(f"the rank of an expert must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ExpertError(f"the dropout of an expert must be from 0 up to but not including 1, got {dropout}")
        if init_lora_weights not in PLAIN_INITIALISATIONS:
            allowed = ", ".join(map(repr, PLAIN_INITIALISATIONS))
            raise ExpertError(f"init_lora_weights must leave the base as it is ({allowed}), got {init_lora_weights!r}")
        if init_lora_weights == "orthogonal" and rank % 2:
            raise ExpertError(f"init_lora_weights='orthogonal' needs an even rank, got {rank}")
        targets, transposed = self._targets(target_modules)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            layers_to_transform=self._layers_to_transform(),
            fan_in_fan_out=transposed,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
        )
        training = self.base_model.training
        with _without_warnings_of_peft():
            if self._peft_model is None:
                self._peft_model = get_peft_model(self.base_model, config, adapter_name=name)
            else:
                self._peft_model.add_adapter(name, config)
        self._welcome(name, training)
        cached = cached_repository(self.base_model.name_or_path or "")
        if cached is not None:  # PEFT has noted the folder, which is on this machine alone
            config.base_model_name_or_path, config.revision = cached
        return name

    def import_adapter(self, path: str | Path, name: str | None = None, revision: str | None = None) -> str:
        """Make an existing PEFT LoRA adapter an expert, its weights as they are, and all experts active.

        Args:
            path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
            name: The name of the folder or the repository by default.
            revision: Commit, tag or branch on the Hub.

        Returns:
            The expert's name.

        Raises:
            ExpertError: The folder is no LoRA adapter, does not fit the base model, or cannot be routed.
            CheckpointError: There is no such folder, or the repository cannot be had.
            ModelError: The base model is offloaded otherwise than by a ``device_map``.
        """
        if not hasattr(self.base_model, "hf_device_map"):  # by which PEFT puts an adapter where its layer is
            refuse_offloaded(self.base_model, "no adapter can be loaded onto it; offload the mixture instead")
        folder, name = adapter_folder_of(path, revision), name or Path(path).absolute().name
        check_import(folder, name, self.base_model, self.layers, self.names)
        training = self.base_model.training
        with _without_warnings_of_peft():
            if self._peft_model is None:
                self._peft_model = PeftModel.from_pretrained(self.base_model, str(folder), adapter_name=name)
            else:
                self._peft_model.load_adapter(str(folder), name)
        self._welcome(name, training)
        return name

    def fitting_weights(self, name: str, path: str | Path) -> dict[str, Tensor]:
        """Reads the weights of an adapter folder for an expert of the same shape; changes nothing.

        Raises:
            ExpertError: There is no such expert, or the folder's weights or their scaling do not fit it.
            ModelError: The base model is offloaded.
        """
        ours_said = self[name].to_dict()
        refuse_offloaded(self.base_model, "no weights can be loaded into its experts; use from_pretrained instead")
        weights, said = read_weights(Path(path)), read_config(Path(path))
        ours = get_peft_model_state_dict(self.peft_model, adapter_name=name, save_embedding_layers=False)
        wrong = difference(tensor_shapes(weights), tensor_shapes(ours))
        if wrong is not None:
            raise ExpertError(f"the weights in {path} do not fit expert {name!r}: {wrong}")
        if scalings(said, weights) != scalings(ours_said, weights):
            raise ExpertError(
                f"the weights in {path} do not fit expert {name!r}: they are scaled by another lora_alpha, rsLoRA or "
                "alpha_pattern; import the folder as an expert of its own"
            )
        return weights

    def load_weights(self, name: str, path: str | Path) -> None:
        """Puts the weights of an adapter folder into an expert of the same shape; raises as ``fitting_weights``."""
        set_peft_model_state_dict(self.peft_model, self.fitting_weights(name, path), adapter_name=name)

    def export(self, name: str, path: str | Path) -> None:
        """Write an expert as a PEFT adapter folder that every tool scales alike, by ``lora_alpha / r``.

        One that is scaled otherwise (rsLoRA, patterns) has that moved into its weights; see ``plain_adapter``.

        Raises:
            ExpertError: There is no such expert.
            CheckpointError: The folder holds something else than an adapter, or cannot be written.
        """
        self.check_known([name])
        check_target(Path(path))
        with atomic_directory(Path(path), marker=CONFIG_FILE) as folder:
            away = is_offloaded(self.base_model)
            write_adapter(folder, self.peft_model, name, state_in_place(self.peft_model) if away else None)
            make_plain(folder)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Routes among these experts alone; with one, the model is the base with that adapter."""
        chosen = [names] if isinstance(names, str) else list(names)
        self.check_known(chosen)
        if not chosen:
            raise ExpertError("at least one expert must be active")
        self.active = [name for name in self.names if name in chosen]
        self._active_indices = [index for index, name in enumerate(self.names) if name in chosen]
        tuner: Any = self.peft_model.base_model
        tuner.set_adapter(self.active, inference_mode=True)
        tuner.set_requires_grad([name for name in self.active if name not in self.frozen])

    def activate_all(self) -> None:
        """Routes among all experts."""
        self.set_active(self.names)

    def freeze(self, *names: str) -> None:
        """Stops training these experts."""
        self.check_known(names)
        self.frozen.update(names)
        self.set_active(self.active)

    def unfreeze(self, *names: str) -> None:
        """Trains these experts again, while they are active."""
        self.check_known(names)
        self.frozen.difference_update(names)
        self.set_active(self.active)

    def active_indices(self) -> list[int]:
        """The router's columns for the active experts, in order."""
        return self._active_indices

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an expert."""
        self.check_known([name])
        marker = f".{name}."
        for key, parameter in self.peft_model.named_parameters():
            if "lora_" in key and marker in key:
                yield parameter

    def num_parameters(self, name: str) -> int:
        """How many parameters an expert has, counted."""
        return sum(parameter.numel() for parameter in self.parameters(name))

    def _welcome(self, name: str, training: bool) -> None:
        self._state = enable_routing(self.peft_model)
        # PEFT makes new layers in training mode, and loads adapters in evaluation mode
        self.peft_model.train(training)
        self.names.append(name)
        self.activate_all()

    def _new_name(self, name: str | None) -> str:
        if name is None:
            taken = [int(match[1]) for known in self.names if (match := re.fullmatch(r"expert_(\d+)", known))]
            name = f"expert_{max(taken, default=-1) + 1}"
        check_new_name(name, self.names, base_modules(self.base_model))
        return name

    def check_known(self, names: Iterable[str]) -> None:
        """Raises ``ExpertError`` for a name that is no expert's."""
        for name in names:
            if name not in self.names:
                known = ", ".join(self.names)
                raise ExpertError(f"there is no expert {name!r} (there are: {known}){did_you_mean(name, self.names)}")

    def _targets(self, wanted: str | Sequence[str] | None) -> tuple[list[str], bool]:
        """The target names, and whether their weights are stored as ``(in, out)`` (GPT-2's Conv1D)."""
        linear = linear_modules(self.base_model, self.layers)
        have = sorted({name.rpartition(".")[2] for name in linear})
        if wanted == ALL_LINEAR:
            targets = have
        elif wanted is None:
            targets = [name for name in AUTO_TARGETS if name in have]
            if not targets:
                raise ModelError(
                    f"{type(self.base_model).__name__} has none of the target modules {', '.join(AUTO_TARGETS)}; "
                    f"name some of its linear modules with --target_modules: {', '.join(have) or 'it has none'}"
                )
        else:
            targets = [wanted] if isinstance(wanted, str) else list(wanted)
            for target in targets:
                if target not in have:
                    raise ModelError(
                        f"--target_modules {target!r} is no linear module of {type(self.base_model).__name__}, "
                        f"which has: {', '.join(have)}{did_you_mean(target, have)}"
                    )
        chosen = [module for name, module in linear.items() if name.rpartition(".")[2] in targets]
        return targets, any(isinstance(module, Conv1D) for module in chosen)

    def _layers_to_transform(self) -> list[int] | None:
        """The layers that carry the next expert; None for all of them."""
        count = len(self.decoder.layers)
        layers = list(range(self.first_layer, count))
        number = len(self.names)
        # the blocks speak of the experts that a mixture began with; one that is added later is carried by all layers
        if self.blocks is not None and number < max(self.blocks):
            layers = [layer for layer, carried in enumerate(carried_by_layers(self.blocks, count)) if carried > number]
        return layers if len(layers) < count else None


@contextmanager
def _without_warnings_of_peft() -> Iterator[None]:
    """Leave out that PEFT asks transformers for a property by its old name: nobody who reads it can mend it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def base_modules(base_model: PreTrainedModel) -> list[str]:
    """Return the full names of a base model's modules, as they are without adapters."""
    inside = (".base_layer", ".lora_")
    return [name for name, _ in base_model.named_modules() if not any(part in name for part in inside)]


def linear_modules(base_model: PreTrainedModel, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return the linear modules in the decoder layers that may carry experts, by their full names."""
    allowed = {id(module) for layer in layers for module in layer.modules()}
    found: dict[str, nn.Module] = {}
    for name in base_modules(base_model):
        module = base_model.get_submodule(name)
        bare = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if id(module) in allowed and isinstance(bare, nn.Linear | Conv1D):
            found[name] = bare
    return found


def adapter_folder_of(path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter, fetched where ``path`` is a Hub id.

    Raises:
        ExpertError: There is no such folder.
        CheckpointError: The repository cannot be had.
    """
    folder = folder_of(path, revision=revision, files=ADAPTER_FILES)
    if not folder.is_dir():
        raise ExpertError(f"there is no folder {str(path)!r} to import an adapter from")
    return folder


def check_import(
    folder: Path, name: str, base_model: PreTrainedModel, layers: Iterable[nn.Module], taken: Iterable[str]
) -> None:
    """Raise ``ExpertError`` unless an adapter folder can become an expert of this name; see ``import_adapter``."""
    modules = base_modules(base_model)
    check_new_name(name, taken, modules)
    check_adapter(folder, linear_modules(base_model, layers), modules)


def check_new_name(name: str, taken: Iterable[str], modules: Iterable[str]) -> None:
    """Raises ``ExpertError`` unless an expert can be called so, given the others' names and those of modules."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise ExpertError(f"an expert's name has letters, digits, _ and - only, got {name!r}")
    if name in taken:
        raise ExpertError(f"there is an expert {name!r} already; choose another name")
    # PEFT tells an adapter's tensors by its name in their keys, and keeps it as an attribute
    parts = {part for module in modules for part in module.split(".")}
    if name in parts or name in _NAMES_IN_KEYS or name.isdigit() or hasattr(nn.ModuleDict, name):
        raise ExpertError(f"an expert cannot be called {name!r}: a module has that name; choose another one")


def check_blocks(blocks: Sequence[int] | None, num_experts: int, routing: RoutingMode, layers: int) -> None:
    """Makes sure that blocks of layers can carry ``blocks`` of the experts.

    Raises:
        ExpertError: The numbers do not fit the experts, the layers or the routing.
    """
    if blocks is None:
        return
    if not blocks or min(blocks) < 1 or max(blocks) != num_experts:
        raise ExpertError(
            f"--experts_per_layer must be numbers from 1 to the number of experts ({num_experts}), and that number "
            f"among them, got {list(blocks)}"
        )
    if len(blocks) > layers:
        raise ExpertError(f"--experts_per_layer must be at most one number a layer ({layers}), got {len(blocks)}")
    if not routing.has_gate_per_layer:
        raise ExpertError(f"--experts_per_layer needs --routing per_layer, got {routing}")


def carried_by_layers(blocks: Sequence[int], layers: int) -> list[int]:
    """How many experts each of the layers carries, where blocks of about equal size carry ``blocks`` of them.

    After MoLA (Gao et al. 2024, "Higher Layers Need More LoRA Experts", arXiv 2402.08562).
    """
    return [blocks[layer * len(blocks) // layers] for layer in range(layers)]


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Counts a module's parameters, each once; with ``trainable`` those that train."""
    return sum(_size(p) for p in module.parameters() if p.requires_grad or not trainable)


def _size(parameter: Tensor) -> int:
    # bitsandbytes packs two weights of 4 bits into a byte; the class is told by its name, as it may not be installed
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
