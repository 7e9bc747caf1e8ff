"""The flags of every command as dataclasses, and the parser that fills them."""

from dylo_moe.config.cloud import SubmitArgs
from dylo_moe.config.commands import (
    AUTO_RESUME,
    COMMANDS,
    LATEST,
    AcquireConfig,
    DataArgs,
    DatasetsArgs,
    GenerateArgs,
    TrainArgs,
    TrainConfig,
)
from dylo_moe.config.composition import DEFAULT_ROUTING, ComposeArgs
from dylo_moe.config.evaluation import OWN_BASE, BenchmarkArgs
from dylo_moe.config.model import ModelArgs
from dylo_moe.config.parser import parse, split_names, to_yaml, with_flags
from dylo_moe.config.skills import ExpertsArgs

__all__ = [
    "AUTO_RESUME",
    "COMMANDS",
    "DEFAULT_ROUTING",
    "LATEST",
    "OWN_BASE",
    "AcquireConfig",
    "BenchmarkArgs",
    "ComposeArgs",
    "DataArgs",
    "DatasetsArgs",
    "ExpertsArgs",
    "GenerateArgs",
    "ModelArgs",
    "SubmitArgs",
    "TrainArgs",
    "TrainConfig",
    "parse",
    "split_names",
    "to_yaml",
    "with_flags",
]
