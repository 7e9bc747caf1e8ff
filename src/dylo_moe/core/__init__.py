"""The mixture itself: base model, experts, router, and the model that they make up."""

# first: importing transformers imports this package (see ``registration``), and a half-imported module cannot be
# imported again
import dylo_moe.core.model  # noqa: F401
from dylo_moe.core import checkpoint
from dylo_moe.core.base import (
    DTYPES,
    cache_directory,
    check_base_model,
    check_quantization,
    evaluating,
    find_decoder,
    fingerprint,
    hidden_states_of,
    load_base_model,
    load_tokenizer,
    module_names,
    portable_name,
    supports_packing,
)
from dylo_moe.core.checkpoint import DESCRIPTION_FILE, ExpertRecord, MixtureConfig, read_description
from dylo_moe.core.lora import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ExpertManager,
    adapter_folder_of,
    check_import,
    check_new_name,
    check_target,
    make_plain,
    read_config,
    read_weights,
)
from dylo_moe.core.losses import IGNORE_INDEX, token_cross_entropy
from dylo_moe.core.model import DyLoRA_MoE, DyLoRAOutput
from dylo_moe.core.output import AuxLossWeights, routing_shares
from dylo_moe.core.parts import RouterSpec, build_parts
from dylo_moe.core.routing import (
    CACHE_NAME,
    YOUNG,
    Context,
    DynamicHybridRouter,
    expert_load,
    expert_mask,
    rms_normalize,
    running_means,
    updated_selection_bias,
)
from dylo_moe.core.save_and_load import TRAINED_FILE, TRAINED_INDEX, load_base_of, locate_base

__all__ = [
    "ADAPTER_FILES",
    "CACHE_NAME",
    "CONFIG_FILE",
    "DESCRIPTION_FILE",
    "DTYPES",
    "IGNORE_INDEX",
    "TRAINED_FILE",
    "TRAINED_INDEX",
    "WEIGHTS_FILE",
    "YOUNG",
    "AuxLossWeights",
    "Context",
    "DyLoRAOutput",
    "DyLoRA_MoE",
    "DynamicHybridRouter",
    "ExpertManager",
    "ExpertRecord",
    "MixtureConfig",
    "RouterSpec",
    "adapter_folder_of",
    "build_parts",
    "cache_directory",
    "check_base_model",
    "check_import",
    "check_new_name",
    "check_quantization",
    "check_target",
    "checkpoint",
    "evaluating",
    "expert_load",
    "expert_mask",
    "find_decoder",
    "fingerprint",
    "hidden_states_of",
    "load_base_model",
    "load_base_of",
    "load_tokenizer",
    "locate_base",
    "make_plain",
    "module_names",
    "portable_name",
    "read_config",
    "read_description",
    "read_weights",
    "rms_normalize",
    "routing_shares",
    "running_means",
    "supports_packing",
    "token_cross_entropy",
    "updated_selection_bias",
]
