"""The experts of one base model: create, activate, freeze, import and export them.

An expert is a plain PEFT adapter. The order of ``ExpertManager.names`` is the order of the router's columns.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.core.base import (
    cached_repository,
    find_decoder,
    is_offloaded,
    keep_trainable,
    refuse_offloaded,
    state_in_place,
)
from dylo_moe.core.lora.adapter_files import (
    CONFIG_FILE,
    first_shape_mismatch,
    read_config,
    read_weights,
    scalings,
    tensor_shapes,
    write_adapter,
)
from dylo_moe.core.lora.enable import enable_routing
from dylo_moe.core.lora.import_checks import adapter_folder_of, check_import, check_new_name
from dylo_moe.core.lora.plain_adapter import check_target, make_plain
from dylo_moe.core.lora.state import RoutingState
from dylo_moe.core.lora.targets import base_modules, layers_of_expert, select_targets
from dylo_moe.durable import atomic_directory
from dylo_moe.errors import ExpertError, ModelError, did_you_mean
from dylo_moe.spec import ExpertSpec

SHARED = "shared"
"""Name of a shared expert that is given none."""


class ExpertManager:
    """The experts of a base model.

    Args:
        base_model: A causal LM; its parameters are frozen. The first expert wraps it in a ``PeftModel``.
        first_layer: The first decoder layer that may carry experts.
        experts_per_block: Number of the first experts that each block of layers carries; see
            ``targets.experts_per_layer``. None for all.

    Attributes:
        decoder: The base model's backbone and decoder layers.
        names: Names of all routed experts, in the order of the router's columns.
        shared: Name of the shared expert, which every token has at weight 1; None where there is none.
        active: Names of the experts that are routed among, in the same order.
        frozen: Names of the experts that do not train.
        pissa_experts: Names of the experts whose second half of ranks is constant; see ``initialization``.
        on_added: Functions to call when an expert was added; a mixture's router grows by one.

    Raises:
        ModelError: The base model has adapters already.
    """

    def __init__(
        self, base_model: PreTrainedModel, first_layer: int = 0, experts_per_block: Sequence[int] | None = None
    ) -> None:
        adapted = next((name for name, module in base_model.named_modules() if isinstance(module, LoraLayer)), None)
        if adapted is not None:
            raise ModelError(f"the base model has adapters already (at {adapted}); unload them, or load it again")
        base_model.requires_grad_(False)
        keep_trainable(base_model)
        self.base_model = base_model
        self.decoder = find_decoder(base_model)
        self.place_on_layers(first_layer, experts_per_block)
        self.pissa_experts: set[str] = set()
        self.names: list[str] = []
        self.shared: str | None = None
        self.active: list[str] = []
        self._active_indices: list[int] = []
        self.frozen: set[str] = set()
        self.on_added: list[Callable[[], object]] = []
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

    @property
    def adapters(self) -> list[str]:
        """Names of the routed experts and, last, of the shared one."""
        return self.names if self.shared is None else [*self.names, self.shared]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that a forward mixes: the active experts and, last, the shared one."""
        return self.active if self.shared is None else [*self.active, self.shared]

    def place_on_layers(self, first_layer: int, experts_per_block: Sequence[int] | None) -> None:
        """Set which layers carry the experts that are created from now on; see the class."""
        self.first_layer = first_layer
        self.experts_per_block = None if experts_per_block is None else list(experts_per_block)

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
        """The state that the routed layers share."""
        if self._state is None:
            raise ExpertError("there is no expert yet; create or import one first")
        return self._state

    def create(
        self, name: str | None = None, spec: ExpertSpec | None = None, *, shared: bool = False, **options: Any
    ) -> str:
        """Create an expert that changes nothing yet (``B`` is zero), and make all experts active.

        Args:
            name: ``expert_N`` by default, or ``shared``.
            spec: Rank, scaling, target modules and start; the default one if not given.
            shared: Whether the router has no column for it: every token has it at weight 1, in all layers.
            **options: Fields of ``ExpertSpec`` instead of a spec.

        Returns:
            The expert's name.

        Raises:
            ExpertError: The name is taken or not usable, or an option is out of its range.
            ModelError: The base model has none of the target modules, or is offloaded.
        """
        spec = ExpertSpec(**options) if spec is None else spec
        name = self._new_name(name, shared)
        refuse_offloaded(self.base_model, "no expert can be made on it; make the mixture first, and offload that")
        if spec.init == "pissa":
            raise ExpertError("`init` pissa divides components among all experts of a new mixture; use another one")
        targets, transposed = select_targets(self.base_model, self.layers, spec.target_modules)
        blocks = None if shared else self.experts_per_block
        layers = layers_of_expert(len(self.names), self.first_layer, blocks, len(self.decoder.layers))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=spec.rank,
            lora_alpha=spec.effective_alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=targets,
            layers_to_transform=layers,
            fan_in_fan_out=transposed,
            use_rslora=spec.use_rslora,
            init_lora_weights=True if spec.init == "default" else spec.init,  # type: ignore[arg-type]
        )
        training = self.base_model.training
        with _without_peft_warnings():
            if self._peft_model is None:
                self._peft_model = get_peft_model(self.base_model, config, adapter_name=name)
            else:
                self._peft_model.add_adapter(name, config)
        self._register_expert(name, training, shared)
        cached = cached_repository(self.base_model.name_or_path or "")
        if cached is not None:  # PEFT has noted a folder that exists on this machine only
            config.base_model_name_or_path, config.revision = cached
        return name

    def import_adapter(
        self, path: str | Path, name: str | None = None, revision: str | None = None, *, shared: bool = False
    ) -> str:
        """Add an existing PEFT LoRA adapter as an expert with its weights, and make all experts active.

        Args:
            path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a Hub id.
            name: The expert's name; by default that of the folder or the repository.
            revision: Commit, tag or branch on the Hub.
            shared: See ``create``.

        Returns:
            The expert's name.

        Raises:
            ExpertError: The folder is not a LoRA adapter, does not fit the base model, or cannot be routed.
            CheckpointError: There is no such folder, or the repository cannot be fetched.
            ModelError: The base model is offloaded, and not by a ``device_map``.
        """
        if not hasattr(self.base_model, "hf_device_map"):  # PEFT needs it to put an adapter on its layer's device
            refuse_offloaded(self.base_model, "no adapter can be loaded onto it; offload the mixture instead")
        folder, name = adapter_folder_of(path, revision), name or Path(path).absolute().name
        self._check_shared(shared)
        check_import(folder, name, self.base_model, self.layers, self.adapters)
        training = self.base_model.training
        with _without_peft_warnings():
            if self._peft_model is None:
                self._peft_model = PeftModel.from_pretrained(self.base_model, str(folder), adapter_name=name)
            else:
                self._peft_model.load_adapter(str(folder), name)
        self._register_expert(name, training, shared)
        return name

    def read_matching_weights(self, name: str, path: str | Path) -> dict[str, Tensor]:
        """Read the weights of an adapter folder for an expert of the same shape; change nothing.

        Raises:
            ExpertError: There is no such expert, or the folder's weights or their scaling do not fit it.
            ModelError: The base model is offloaded.
        """
        our_config = self[name].to_dict()
        refuse_offloaded(self.base_model, "no weights can be loaded into its experts; use from_pretrained instead")
        weights, config = read_weights(Path(path)), read_config(Path(path))
        ours = get_peft_model_state_dict(self.peft_model, adapter_name=name, save_embedding_layers=False)
        wrong = first_shape_mismatch(tensor_shapes(weights), tensor_shapes(ours))
        if wrong is not None:
            raise ExpertError(f"the weights in {path} do not fit expert {name!r}: {wrong}")
        if scalings(config, weights) != scalings(our_config, weights):
            raise ExpertError(
                f"the weights in {path} do not fit expert {name!r}: they are scaled by another lora_alpha, rsLoRA or "
                "alpha_pattern; import the folder as another expert"
            )
        return weights

    def load_weights(self, name: str, path: str | Path) -> None:
        """Load the weights of an adapter folder into an expert of the same shape; see ``read_matching_weights``."""
        set_peft_model_state_dict(self.peft_model, self.read_matching_weights(name, path), adapter_name=name)

    def export(self, name: str, path: str | Path) -> None:
        """Write an expert as a PEFT adapter folder that is scaled by ``lora_alpha / r`` in every tool.

        Any other scaling (rsLoRA, patterns) is folded into the weights; see ``plain_adapter``.

        Raises:
            ExpertError: There is no such expert.
            CheckpointError: The folder has other files than an adapter's, or cannot be written.
        """
        self.check_known([name])
        check_target(Path(path))
        with atomic_directory(Path(path), marker=CONFIG_FILE) as folder:
            state = state_in_place(self.peft_model) if is_offloaded(self.base_model) else None
            write_adapter(folder, self.peft_model, name, state)
            make_plain(folder)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Route among these experts only; with one, the model is the base with that adapter.

        Raises:
            ExpertError: There is no such expert, or no name is given.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self.check_routed(wanted)
        if not wanted:
            raise ExpertError("at least one expert must be active")
        self.active = [name for name in self.names if name in wanted]
        self._active_indices = [index for index, name in enumerate(self.names) if name in wanted]
        tuner: Any = self.peft_model.base_model
        tuner.set_adapter(self.active_adapters, inference_mode=True)
        tuner.set_requires_grad([name for name in self.active_adapters if name not in self.frozen])

    def activate_all(self) -> None:
        """Route among all experts."""
        self.set_active(self.names)

    def freeze(self, *names: str) -> None:
        """Stop training these experts."""
        self.check_known(names)
        self.frozen.update(names)
        self.set_active(self.active)

    def unfreeze(self, *names: str) -> None:
        """Train these experts again while they are active."""
        self.check_known(names)
        self.frozen.difference_update(names)
        self.set_active(self.active)

    def active_indices(self) -> list[int]:
        """Return the router's columns of the active experts, in order."""
        return self._active_indices

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an expert."""
        self.check_known([name])
        marker = f".{name}."
        for key, parameter in self.peft_model.named_parameters():
            if "lora_" in key and marker in key:
                yield parameter

    def num_parameters(self, name: str) -> int:
        """Return the number of parameters of an expert."""
        return sum(parameter.numel() for parameter in self.parameters(name))

    def _register_expert(self, name: str, training: bool, shared: bool) -> None:
        self._state = enable_routing(self.peft_model)
        # PEFT makes new layers in training mode, and loads adapters in evaluation mode
        self.peft_model.train(training)
        if shared:
            self.shared, self._state.has_shared_expert = name, True
            self.set_active(self.active)
            return
        self.names.append(name)
        self.activate_all()
        for call in self.on_added:
            call()

    def _check_shared(self, shared: bool) -> None:
        if shared and (self.shared is not None or not self.names):
            have = "no routed expert yet" if not self.names else f"the shared expert {self.shared!r} already"
            raise ExpertError(f"a mixture has one shared expert, made after the routed ones; this one has {have}")

    def _new_name(self, name: str | None, shared: bool) -> str:
        """Return the name of a new expert, checked."""
        self._check_shared(shared)
        if name is None and shared:
            name = SHARED
        if name is None:
            taken = [int(match[1]) for known in self.names if (match := re.fullmatch(r"expert_(\d+)", known))]
            name = f"expert_{max(taken, default=-1) + 1}"
        check_new_name(name, self.adapters, base_modules(self.base_model))
        return name

    def check_known(self, names: Iterable[str]) -> None:
        """Raise ``ExpertError`` unless all names are experts'."""
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters)
                raise ExpertError(
                    f"there is no expert {name!r} (there are: {known}){did_you_mean(name, self.adapters)}"
                )

    def check_routed(self, names: Iterable[str]) -> None:
        """Raise ``ExpertError`` unless all names are those of experts that the router knows."""
        wanted = list(names)
        self.check_known(wanted)
        if self.shared in wanted:
            raise ExpertError(f"the shared expert {self.shared!r} is always active; name routed experts only")


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Hide PEFT's warning that it uses a deprecated property of transformers, which a user cannot fix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of a module's parameters, each counted once; with ``trainable`` only those that train."""
    counted = (parameter for parameter in module.parameters() if parameter.requires_grad or not trainable)
    # bitsandbytes packs two 4-bit weights into a byte; compared by name, since it may not be installed
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in counted)
