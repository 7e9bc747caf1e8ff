"""The frozen causal language model: loading it, and finding out how it is built."""

from dylo_moe.core.base.embedded import EMBEDDED, cache_directory
from dylo_moe.core.base.fingerprint import FINGERPRINT_PATTERN, fingerprint, same_base_model
from dylo_moe.core.base.hub import folder_of, is_hub_id
from dylo_moe.core.base.lm_head import linear_lm_head
from dylo_moe.core.base.loading import (
    DTYPES,
    cached_repository,
    check_base_model,
    load_base_model,
    load_tokenizer,
    local_tokenizer,
    module_names,
    portable_name,
)
from dylo_moe.core.base.offload import device_of, in_place, is_offloaded, refuse_offloaded, state_in_place
from dylo_moe.core.base.quantization import check_quantization, keep_trainable
from dylo_moe.core.base.segments import check_segments, positions_in_segments, supports_packing
from dylo_moe.core.base.structure import (
    Decoder,
    argument_names,
    evaluating,
    find_decoder,
    hidden_states_of,
    is_wrapped,
    named_arguments,
)

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "FINGERPRINT_PATTERN",
    "Decoder",
    "argument_names",
    "cache_directory",
    "cached_repository",
    "check_base_model",
    "check_quantization",
    "check_segments",
    "device_of",
    "evaluating",
    "find_decoder",
    "fingerprint",
    "folder_of",
    "hidden_states_of",
    "in_place",
    "is_hub_id",
    "is_offloaded",
    "is_wrapped",
    "keep_trainable",
    "linear_lm_head",
    "load_base_model",
    "load_tokenizer",
    "local_tokenizer",
    "module_names",
    "named_arguments",
    "portable_name",
    "positions_in_segments",
    "refuse_offloaded",
    "same_base_model",
    "state_in_place",
    "supports_packing",
]
