"""Datasets as prompts and responses, and as rows of tokens."""

from dylo_moe.data.decontamination import decontaminate
from dylo_moe.data.examples import SPLITS, get_dataset, read_examples, read_rows, splits_of
from dylo_moe.data.formats import FORMATS, Row, user_message
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.data.pipeline import PreparedData, prepare_data, prepare_sample
from dylo_moe.data.registry import AVAILABLE_DATASETS, REGISTRY, DatasetSpec, refuse_for_training, resolve
from dylo_moe.data.templates import AUTO, PlainTemplate, template_of
from dylo_moe.data.tokenization import encode_prompt

__all__ = [
    "AUTO",
    "AVAILABLE_DATASETS",
    "FORMATS",
    "REGISTRY",
    "SPLITS",
    "DatasetSpec",
    "PlainTemplate",
    "PreparedData",
    "Row",
    "TokenCollator",
    "TokenRows",
    "decontaminate",
    "encode_prompt",
    "get_dataset",
    "prepare_data",
    "prepare_sample",
    "read_examples",
    "read_rows",
    "refuse_for_training",
    "resolve",
    "splits_of",
    "template_of",
    "user_message",
]
