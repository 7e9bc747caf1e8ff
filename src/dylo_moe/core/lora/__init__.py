"""LoRA experts on PEFT: a layer that mixes them by per-token weights, and their manager."""

from dylo_moe.core.lora.adapter_files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    first_shape_mismatch,
    read_config,
    read_weights,
    tensor_shapes,
    write_adapter,
)
from dylo_moe.core.lora.extension import Extension, extend, restore
from dylo_moe.core.lora.forward import RoutedBackbone, check_weights
from dylo_moe.core.lora.import_checks import adapter_folder_of, check_import, check_new_name
from dylo_moe.core.lora.initialization import create_experts, hold_constant, initialize_eva
from dylo_moe.core.lora.manager import ExpertManager, count_parameters
from dylo_moe.core.lora.plain_adapter import check_target, make_plain
from dylo_moe.core.lora.state import ForwardCall, ForwardRecord, RoutesFound, RoutingState, Run
from dylo_moe.core.lora.targets import check_experts_per_block, experts_per_layer
from dylo_moe.core.lora.token_weights import TokenWeights, one_hot_weights

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "ExpertManager",
    "Extension",
    "ForwardCall",
    "ForwardRecord",
    "RoutedBackbone",
    "RoutesFound",
    "RoutingState",
    "Run",
    "TokenWeights",
    "adapter_folder_of",
    "check_experts_per_block",
    "check_import",
    "check_new_name",
    "check_target",
    "check_weights",
    "count_parameters",
    "create_experts",
    "experts_per_layer",
    "extend",
    "first_shape_mismatch",
    "hold_constant",
    "initialize_eva",
    "make_plain",
    "one_hot_weights",
    "read_config",
    "read_weights",
    "restore",
    "tensor_shapes",
    "write_adapter",
]
