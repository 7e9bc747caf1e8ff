"""``config.json`` of a mixture's folder, by which transformers reads the folder as a model.

The mixture itself is loaded from ``dylo_moe.json``. ``config.json`` names the class, and carries the base model's
configuration, so that tools can read the vocabulary or the positions without loading anything.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_MODEL_TYPE = "dylo_moe"
_CLASS_NAME = "DyLoRA_MoE"
MODELING_FILE = "modeling_dylo_moe.py"

MODELING_SOURCE = '''"""For AutoModelForCausalLM with trust_remote_code=True; needs the package dylora-moe."""

from dylo_moe import DyLoRA_MoE, DyLoRAConfig

__all__ = ["DyLoRAConfig", "DyLoRA_MoE"]
'''
"""Written into a mixture's folder. Not needed after ``import dylo_moe``, which registers the class."""


class DyLoRAConfig(PreTrainedConfig):
    """The configuration of a mixture's folder.

    Args:
        base_config: The base model's configuration, as a dictionary with its ``model_type``.
        **kwargs: Passed to ``transformers.PreTrainedConfig``.
    """

    model_type = _MODEL_TYPE
    base_config: Any = None

    def __init__(self, base_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_config = base_config or {}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the configuration of the base's language model."""
        if not self.base_config:
            return self
        base = dict(self.base_config)
        return AutoConfig.for_model(base.pop("model_type"), **base).get_text_config()


def folder_config(base_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the contents of ``config.json`` for a mixture on a base model."""
    base = base_config.to_dict()
    base.pop("keys_to_ignore_at_inference", None)
    text = base_config.get_text_config()
    config = DyLoRAConfig(
        base,
        # the server of transformers imports a class of this name from transformers itself
        architectures=["AutoModelForCausalLM"],
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    module = MODELING_FILE.removesuffix(".py")
    return {
        **config.to_dict(),
        "auto_map": {"AutoConfig": f"{module}.DyLoRAConfig", "AutoModelForCausalLM": f"{module}.{_CLASS_NAME}"},
    }


def register(model_class: type[Any]) -> None:
    """Register mixtures with ``AutoConfig`` and ``AutoModelForCausalLM``."""
    AutoConfig.register(_MODEL_TYPE, DyLoRAConfig, exist_ok=True)
    AutoModelForCausalLM.register(DyLoRAConfig, model_class, exist_ok=True)
    # the Trainer's label smoother, pipelines and the server look up causal LMs here by name
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_MODEL_TYPE] = _CLASS_NAME
