"""What tools ask of any transformers model, answered for a mixture.

A mixture is a ``PreTrainedModel`` so that the Trainer, TRL, pipelines and evaluation harnesses take it as it is. What
they ask is answered by the base model: its configuration, its embeddings, its way to generate. What would change the
bare base behind the mixture's back is refused by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from dylo_moe.core.expert import ExpertManager, count_parameters
from dylo_moe.core.offload import device_of
from dylo_moe.errors import ModelError, RoutingError

NOT_FOR_METRICS = ("lm_loss", "aux_loss", "balance_loss", "z_loss", "router_logits", "routing_weights")
"""What a forward returns beside the usual, and what the Trainer must not gather as predictions."""

NOT_SAVED = "a mixture that is not saved: pass ref_model=copy.deepcopy(model), or call save_pretrained first"
"""Stands where trainers look for a place to load a second copy from: they would take the bare base from its own."""

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
    """The part of a mixture that stands in for its base model.

    Args:
        experts: The mixture's.

    Attributes:
        base_name: What the base model is loaded by.
    """

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    experts: ExpertManager

    def __init__(self, experts: ExpertManager) -> None:
        self.experts = experts  # first, since the properties below read it
        base = experts.base_model
        generation_config = base.generation_config
        super().__init__(base.config)
        base.generation_config = generation_config
        self.loss_type = "ForCausalLM"

    def _mark_config(self, undo: list[Callable[[], None]]) -> None:
        """Put into the base's configuration what tools read there of the whole model; ``undo`` takes it out again."""
        config = self.config
        ignored = getattr(config, "keys_to_ignore_at_inference", [])
        undo.append(partial(delattr, config, "keys_to_ignore_at_inference"))
        config.keys_to_ignore_at_inference = [*dict.fromkeys([*ignored, *NOT_FOR_METRICS])]
        undo.append(partial(setattr, config, "_name_or_path", config._name_or_path))
        config._name_or_path = self.name_or_path = NOT_SAVED

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
    def base_model(self) -> nn.Module:
        """The mixture without its language-modelling head: its forward is routed, and gives ``last_hidden_state``."""
        return self.experts.decoder.backbone

    @property
    def device(self) -> torch.device:
        """Where the base model computes."""
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
        """The frozen base, which the Trainer does not miss in a checkpoint."""
        return {name for name in self.state_dict() if "lora_" not in name and not name.startswith("router.")}

    @classmethod
    def can_generate(cls) -> bool:
        """Tell that it can."""
        return True

    @override
    def get_input_embeddings(self) -> nn.Module:
        return self.experts.base_model.get_input_embeddings()

    @override
    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.experts.base_model.get_output_embeddings()
        return head

    @override
    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.experts.base_model.tie_weights(*args, **kwargs)

    @override
    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        self.experts.base_model.set_attn_implementation(*args, **kwargs)

    @override
    def init_weights(self) -> None:
        """Do nothing: the weights are there."""

    def initialize_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the weights are there."""

    def post_init(self) -> None:
        """Do nothing: the base model has done it."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return attn_implementation  # the base model has checked it

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return experts_implementation

    def num_trainable_parameters(self) -> int:
        """Count the parameters that train: those with a gradient, without the constants that an expert holds."""
        held = self.experts.held & set(self.experts.active) - self.experts.frozen
        return count_parameters(self, trainable=True) - sum(self.experts.num_parameters(name) // 2 for name in held)

    def num_base_parameters(self) -> int:
        """Count the parameters of the frozen base."""
        return count_parameters(self.model) - sum(map(self.experts.num_parameters, self.experts.names))

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in the words of PEFT."""
        trained, every = self.num_trainable_parameters(), count_parameters(self)
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")  # noqa: T201

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Trade time for memory in training; the recomputation routes as the first run did.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``.
            **options: Passed to the base model's method of the same name.

        Raises:
            RoutingError: ``use_reentrant`` was asked for: it would lose the gradient to the router.
        """
        for_torch = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if for_torch["use_reentrant"]:
            raise RoutingError("activation checkpointing needs use_reentrant=False here, got True")
        base: Any = self.experts.base_model
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=for_torch, **options)
        else:  # its name before transformers had the other one
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=for_torch, **options)

    def activation_checkpointing_disable(self) -> None:
        """End activation checkpointing."""
        base: Any = self.experts.base_model
        if hasattr(base, "activation_checkpointing_disable"):
            base.activation_checkpointing_disable()
        else:
            base.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Do as ``activation_checkpointing_enable``, of which this is the older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Do as ``activation_checkpointing_disable``, of which this is the older name."""
        self.activation_checkpointing_disable()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the base model does."""
        base: Any = self.experts.base_model
        return base.prepare_inputs_for_generation(*args, **kwargs)

    @override
    def __repr__(self) -> str:
        base = type(self.experts.base_model).__name__
        return (
            f"{type(self).__name__}({len(self.experts)} experts ({', '.join(self.experts)}) on {base}, routing "
            f"{self.routing!r})"
        )


def _refusing(name: str, remedy: str) -> Any:
    def refuse(self: OrdinaryModel, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(f"{name} would change the base model behind the mixture's back; {remedy}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {remedy}."
    return refuse


def _of_base(name: str) -> property:
    def get(self: OrdinaryModel) -> Any:
        return getattr(self.experts.base_model, name)

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


def rows_of_experts(names: list[str], rows: list[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return routing weights that send each row to one expert, ``(rows, 1, num_experts)``.

    Args:
        names: The active experts.
        rows: The expert of each row, or ``__base__`` for the base alone, as in PEFT's mixed batches.
        dtype: Of the weights.
        device: Of the weights.
    """
    unknown = sorted({row for row in rows if row not in names and row != "__base__"})
    if unknown:
        raise RoutingError(
            f"adapter_names must be active experts ({', '.join(names)}) or __base__, got {', '.join(unknown)}"
        )
    weights = torch.zeros(len(rows), 1, len(names), dtype=dtype, device=device)
    for index, row in enumerate(rows):
        if row != "__base__":
            weights[index, 0, names.index(row)] = 1
    return weights
