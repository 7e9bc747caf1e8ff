"""The methods and properties of a transformers model that tools use, for a mixture.

A mixture is a ``PreTrainedModel`` so that the Trainer, TRL, pipelines and evaluation harnesses accept it. Its
configuration, embeddings and generation are those of the base model. Methods that would change the base model under
the mixture are refused by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from dylo_moe.core.base import check_segments, device_of, supports_packing
from dylo_moe.core.lora import ExpertManager, count_parameters
from dylo_moe.errors import ModelError, RoutingError
from dylo_moe.spec import RoutingMode

_NOT_FOR_METRICS = ("lm_loss", "aux_loss", "balance_loss", "z_loss", "router_logits", "routing_weights")
"""Outputs of a forward that the Trainer must not gather as predictions."""

_NOT_SAVED = "a mixture that is not saved: pass ref_model=copy.deepcopy(model), or call save_pretrained first"
"""Name of an unsaved mixture. Trainers load a second copy by name, and the base's name would load the bare base."""

_REFUSED = {
    "resize_token_embeddings": "resize the base model before you make the mixture",
    "set_input_embeddings": "set them on the base model before you make the mixture",
    "set_output_embeddings": "set them on the base model before you make the mixture",
    "add_adapter": "use add_expert",
    "load_adapter": "use import_expert",
    "set_adapter": "use experts.set_active",
    "delete_adapter": "use dylora-moe experts FOLDER --remove NAME on the saved mixture",
    "enable_adapters": "use experts.activate_all",
    "disable_adapters": "use base_only() for a block of code",
    "active_adapters": "read experts.active",
    "get_adapter_state_dict": "use experts.export",
    "prune_heads": "prune the base model before you make the mixture",
    "quantize": "load the base model in 4 or 8 bits with bits=",
    "dequantize": "load the base model without bits=",
}


class OrdinaryModel(PreTrainedModel):
    """The part of a mixture that acts as its base model.

    Args:
        experts: The mixture's experts, with its base model.

    Attributes:
        routing_mode: Routing mode, with its layer.
    """

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    experts: ExpertManager
    routing_mode: RoutingMode

    def __init__(self, experts: ExpertManager) -> None:
        self.experts = experts  # first: the properties below read it
        base = experts.base_model
        generation_config = base.generation_config
        super().__init__(base.config)
        base.generation_config = generation_config
        self.loss_type = "ForCausalLM"
        self._keeps_examples_apart: bool | None = None

    def _mark_config(self, undo: list[Callable[[], None]]) -> None:
        """Set fields of the base's configuration that tools read for the whole model; ``undo`` resets them."""
        config = self.config
        ignored = getattr(config, "keys_to_ignore_at_inference", [])
        undo.append(partial(delattr, config, "keys_to_ignore_at_inference"))
        config.keys_to_ignore_at_inference = [*dict.fromkeys([*ignored, *_NOT_FOR_METRICS])]
        undo.append(partial(setattr, config, "_name_or_path", config._name_or_path))
        config._name_or_path = self.name_or_path = _NOT_SAVED

    @property
    def config(self) -> PreTrainedConfig:
        """The base model's configuration."""
        return self.experts.base_model.config

    @config.setter
    def config(self, value: PreTrainedConfig) -> None:
        self.experts.base_model.config = value

    @property
    def generation_config(self) -> GenerationConfig:
        """The base model's defaults for ``generate``."""
        config: GenerationConfig = self.experts.base_model.generation_config
        return config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.experts.base_model.generation_config = value

    @property
    def _base(self) -> Any:
        """The base model, for methods that versions of transformers name or type differently."""
        return self.experts.base_model

    @property
    def base_model(self) -> nn.Module:
        """The mixture without its head: a routed forward that returns ``last_hidden_state``."""
        return self.experts.decoder.backbone

    @property
    def routing(self) -> str:
        """The routing mode as text, such as ``prefix:4``."""
        return str(self.routing_mode)

    @property
    def device(self) -> torch.device:
        """The device on which the base model computes."""
        return device_of(self.experts.base_model)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's floating type."""
        return self.experts.base_model.dtype

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        """The tied parameters of the base model, by their names here."""
        tied: dict[str, str] = getattr(self.experts.base_model, "all_tied_weights_keys", None) or {}
        prefix = "model.base_model.model."
        return {prefix + name: prefix + other for name, other in tied.items()}

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:  # type: ignore[override]
        """Keys of the frozen base, which the Trainer does not expect in a checkpoint."""
        return {name for name in self.state_dict() if "lora_" not in name and not name.startswith("router.")}

    @classmethod
    def can_generate(cls) -> bool:
        """Return True."""
        return True

    @override
    def get_input_embeddings(self) -> nn.Module:
        return self.experts.base_model.get_input_embeddings()

    @override
    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.experts.base_model.get_output_embeddings()
        return head

    @override
    def tie_weights(self, *args: object, **kwargs: object) -> None:
        self._base.tie_weights(*args, **kwargs)

    @override
    def set_attn_implementation(self, *args: object, **kwargs: object) -> None:
        self._base.set_attn_implementation(*args, **kwargs)

    @override
    def init_weights(self) -> None:
        """Do nothing: the weights are there."""

    def initialize_weights(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the weights are there."""

    def post_init(self) -> None:
        """Do nothing: the base model has done it."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: object, **kwargs: object) -> Any:
        return attn_implementation  # the base model has checked it

    def _check_and_adjust_experts_implementation(
        self, experts_implementation: Any, *args: object, **kwargs: object
    ) -> Any:
        return experts_implementation

    def num_trainable_parameters(self) -> int:
        """Return the number of parameters that train, without the constants of PiSSA experts."""
        training = set(self.experts.active_adapters) - self.experts.frozen
        constant = sum(self.experts.num_parameters(name) // 2 for name in self.experts.pissa_experts & training)
        return count_parameters(self, trainable=True) - constant

    def num_base_parameters(self) -> int:
        """Return the number of parameters of the frozen base."""
        return count_parameters(self.model) - sum(map(self.experts.num_parameters, self.experts.adapters))

    def print_trainable_parameters(self) -> None:
        """Print the number of parameters that train, in PEFT's format."""
        trained, every = self.num_trainable_parameters(), count_parameters(self)
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")  # noqa: T201

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, object] | None = None, **options: object
    ) -> None:
        """Recompute activations in the backward pass to save memory; the recomputation routes as the first run did.

        Args:
            activation_checkpointing_kwargs: Passed to ``torch.utils.checkpoint.checkpoint``.
            **options: Passed to the base model's method of the same name.

        Raises:
            RoutingError: ``use_reentrant`` is True, which would lose the router's gradient.
        """
        for_torch = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if for_torch["use_reentrant"]:
            raise RoutingError("`use_reentrant` must be False for a mixture's activation checkpointing, got True")
        if hasattr(self._base, "activation_checkpointing_enable"):
            self._base.activation_checkpointing_enable(activation_checkpointing_kwargs=for_torch, **options)
        else:  # its name in older versions of transformers
            self._base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=for_torch, **options)

    def activation_checkpointing_disable(self) -> None:
        """End activation checkpointing."""
        if hasattr(self._base, "activation_checkpointing_disable"):
            self._base.activation_checkpointing_disable()
        else:
            self._base.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, object] | None = None, **options: object
    ) -> None:
        """Call ``activation_checkpointing_enable``; this is its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Call ``activation_checkpointing_disable``; this is its older name."""
        self.activation_checkpointing_disable()

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> Any:
        """Call the base model's method."""
        return self._base.prepare_inputs_for_generation(*args, **kwargs)

    def generate_batch(self, *args: object, **kwargs: object) -> Any:
        """Generate by continuous batching; see ``transformers``.

        Raises:
            RoutingError: The mode needs more of earlier tokens than a paged cache holds.
        """
        self._check_paged()
        return self._base.generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: object, **kwargs: object) -> Any:
        """Start continuous batching; raises as ``generate_batch``."""
        self._check_paged()
        return self._base.init_continuous_batching(*args, **kwargs)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the base model alone, without any expert, for a block of code."""
        with self.experts.routing_state.scoped(base_only=True):
            yield

    disable_adapter = base_only

    def _check_segments(self, segment_ids: Tensor) -> None:
        check_segments(self.experts.base_model, segment_ids)
        if self._keeps_examples_apart is None:
            with self.base_only():
                self._keeps_examples_apart = supports_packing(self.experts.base_model)
        if not self._keeps_examples_apart:
            raise RoutingError(
                f"`segment_ids`: {type(self.experts.base_model).__name__} lets the examples of a row see each other; "
                "give each example a row of its own"
            )

    def _check_paged(self) -> None:
        if self.routing_mode.needs_router_cache:
            raise RoutingError(
                f"`routing` {self.routing_mode.kind} does not work with continuous batching, whose cache has keys and "
                "values alone; use generate, or a mixture with routing per_layer or prefix:K"
            )

    @contextmanager
    def _overrides_of_generate(self) -> Iterator[None]:
        """Let the base model generate with the private methods that tools have set on this object."""
        base, own = vars(self.experts.base_model), vars(self)
        names = [name for name in own if name.startswith("_") and callable(getattr(GenerationMixin, name, None))]
        changed = {name: own[name] for name in names if name not in base}
        base.update(changed)
        try:
            yield
        finally:
            for name in changed:
                base.pop(name, None)

    def _given_weights(self, routing_weights: Tensor | None, adapter_names: Sequence[str] | None) -> Tensor | None:
        shared = self.experts.shared is not None
        if adapter_names is None:
            if shared and routing_weights is not None and routing_weights.shape[-1] == len(self.experts.active):
                return F.pad(routing_weights, (0, 1), value=1.0)
            return routing_weights
        if routing_weights is not None:
            raise RoutingError("`adapter_names` and `routing_weights` both choose a row's expert; give one of them")
        return _rows_of_experts(self.experts.active, shared, adapter_names, torch.float32, self.device)

    @override
    def __repr__(self) -> str:
        base = type(self.experts.base_model).__name__
        return (
            f"{type(self).__name__}({len(self.experts)} experts ({', '.join(self.experts)}) on {base}, routing "
            f"{self.routing!r})"
        )


def _refusing(name: str, remedy: str) -> Callable[..., NoReturn]:
    def refuse(self: OrdinaryModel, *args: object, **kwargs: object) -> NoReturn:
        raise ModelError(f"{name} would change the base model under the mixture; {remedy}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {remedy}."
    return refuse


def _of_base(name: str) -> property:
    def get(self: OrdinaryModel) -> object:
        value: object = getattr(self.experts.base_model, name)
        return value

    return property(get, doc=f"``{name}`` of the base model.")


_OF_BASE = (
    "_can_compile_fullgraph",
    "_is_stateful",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "main_input_name",
)
for _name in _OF_BASE:
    if hasattr(PreTrainedModel, _name):
        setattr(OrdinaryModel, _name, _of_base(_name))

for _name, _remedy in _REFUSED.items():
    setattr(OrdinaryModel, _name, _refusing(_name, _remedy))


def _rows_of_experts(
    names: list[str], shared: bool, rows: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return routing weights that send each row to one expert, ``(rows, 1, num_experts)``.

    Args:
        names: Names of the active experts.
        shared: Whether there is a shared expert, which has the last column.
        rows: The expert of each row, or ``__base__`` for the base alone, as in PEFT's mixed batches.
        dtype: Floating type of the weights.
        device: Device of the weights.

    Raises:
        RoutingError: A row names no active expert.
    """
    unknown = sorted({row for row in rows if row not in names and row != "__base__"})
    if unknown:
        raise RoutingError(
            f"`adapter_names` must be active experts ({', '.join(names)}) or __base__, got {', '.join(unknown)}"
        )
    weights = torch.zeros(len(rows), 1, len(names) + shared, dtype=dtype, device=device)
    for index, row in enumerate(rows):
        if row != "__base__":
            weights[index, 0, [names.index(row), -1] if shared else names.index(row)] = 1
    return weights
