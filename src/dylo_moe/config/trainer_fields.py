"""The fields of ``transformers.TrainingArguments`` that are flags although no group of ``commands.py`` names them.

They are passed on unchanged. A field that would break a promise of this package, or that it sets itself, is refused
with the reason: accepting a flag and ignoring it would be worse.
"""

import dataclasses
from collections.abc import Iterable
from enum import Enum
from functools import reduce
from inspect import isclass
from operator import or_
from typing import get_args, get_type_hints

from transformers import TrainingArguments

from dylo_moe.config.parser import Group, hidden_flag
from dylo_moe.errors import ConfigError

_OWN_SAMPLER = "the order of the data is given by --interleaved_sampling, --mixing_temperature and --seed"
_BEST = "the best model is the one with the lowest mean loss over the domains, and it is loaded at the end"
_HUB = "a run publishes nothing; upload OUTPUT_DIR/best_model after it has ended"
_METRICS = "evaluation gathers sums per example, and they are needed whole"
_ALWAYS = "train always trains, and evaluates as --eval_strategy says"

REFUSED = {
    "remove_unused_columns": "the batches need every column of the data",
    "label_names": "the labels are the column 'labels'",
    "include_num_input_tokens_seen": "real tokens are always counted",
    "load_best_model_at_end": f"{_BEST}, unless --save_strategy or --eval_strategy is no",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "prediction_loss_only": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "include_for_metrics": _METRICS,
    "bf16_full_eval": "it would round the experts, and keep them so; give --bf16",
    "fp16_full_eval": "it would round the experts, and keep them so; give --bf16",
    "train_sampling_strategy": _OWN_SAMPLER,
    "length_column_name": _OWN_SAMPLER,
    "data_seed": _OWN_SAMPLER,
    "auto_find_batch_size": "the order of the data depends on the batch size; give a smaller --train_batch_size",
    "average_tokens_across_devices": "losses are always means over the tokens of all devices",
    "save_only_model": "such a checkpoint could not be resumed from",
    "use_liger_kernel": "it replaces the loss, and the loss here is computed in chunks already",
    "liger_kernel_config": "it replaces the loss, and the loss here is computed in chunks already",
    "neftune_noise_alpha": "noise on the embeddings would reach the router too",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "do_predict": _ALWAYS,
    "parallelism_config": "it is not text; set it up with accelerate config",
    "local_rank": "torchrun and accelerate launch set it",
}
"""The refused fields, each with the reason."""


@dataclasses.dataclass
class PassthroughArgs(Group):
    """Any other field of ``transformers.TrainingArguments`` is a flag too, and a key of the YAML file."""

    title = "any field of transformers.TrainingArguments"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.given:
            if name in REFUSED:
                raise ConfigError(f"--{name} cannot be given: {REFUSED[name]}")

    @property
    def given(self) -> dict[str, object]:
        """The given fields, with their values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def other_fields(named: Iterable[str]) -> type[PassthroughArgs]:
    """Return the dataclass of all fields of ``TrainingArguments`` except those that are ``named`` already."""
    taken = set(named)
    fields = []
    for name, hint in get_type_hints(TrainingArguments).items():
        if name in TrainingArguments.__dataclass_fields__ and name not in taken:
            # a file holds text, which `TrainingArguments` converts to the enum: `SomeEnum | str` is `str` here
            kept = [part for part in get_args(hint) if not (isclass(part) and issubclass(part, Enum))]
            kind = object if name in REFUSED else reduce(or_, kept) if str in kept else hint
            fields.append((name, kind | None, hidden_flag()))
    return dataclasses.make_dataclass("OtherFields", fields, bases=(PassthroughArgs,))
