"""From named datasets to rows of token ids with labels on the response alone.

Prompt and response are tokenised apart, so that the boundary between them in training is the one that generation
sees. Mixing happens after splitting, always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.data.registry import get_dataset
from dylo_moe.errors import DatasetError


@dataclass
class PreparedData:
    """Token rows for training and evaluation.

    Rows have ``input_ids``, ``attention_mask``, ``labels``, ``length`` and ``domain``, an index into ``domains``.

    Attributes:
        train: The mixed training rows.
        validation: Held-out rows of all domains.
        domains: The names that ``domain`` counts.
        notes: What was cut or dropped, a line each.
    """

    train: Dataset
    validation: Dataset
    domains: list[str]
    notes: list[str] = field(default_factory=list)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model will see it: with the special tokens that the tokenizer puts in front."""
    ids: list[int] = tokenizer(prompt).input_ids
    # some tokenizers end every text; a prompt has to stay open
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int
) -> dict[str, list[int]] | None:
    """Token ids and labels of one example, ended by the end-of-text token, which is learned too.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each of at most ``max_length``, the response cut where it
        is longer; None where the prompt alone leaves no room for a response.
    """
    head = encode_prompt(tokenizer, prompt)
    tail = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(head) >= max_length:
        return None
    ids = (head + tail)[:max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": ([IGNORE_INDEX] * len(head) + tail)[:max_length],
    }


def prepare_data(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    training_percent: float = 100.0,
    validation_percent: float = 100.0,
    interleaved: bool = False,
    seed: int = 42,
) -> PreparedData:
    """Reads, splits, tokenises and mixes datasets.

    Args:
        names: Datasets of the registry.
        tokenizer: The base model's.
        max_length: Longest row, in tokens.
        training_percent: Share of the training rows, chosen at random by ``seed``.
        validation_percent: The same for held-out rows.
        interleaved: Equal shares of all datasets, small ones repeating; else each row once.
        seed: Seed of the choice and of the mixing; the splits do not depend on it.

    Raises:
        DatasetError: A dataset is unknown, unreachable or empty, or no row of it fits ``max_length``.
    """
    prepared = PreparedData(Dataset.from_list([]), Dataset.from_list([]), list(names))
    parts: dict[str, list[Dataset]] = {"train": [], "validation": []}
    percents = {"train": training_percent, "validation": validation_percent}
    for domain, name in enumerate(names):
        splits = get_dataset(name)
        for split, percent in percents.items():
            chosen = _subset(splits[split], percent, seed)
            parts[split].append(_tokenised(chosen, tokenizer, domain, max_length, f"{name} {split}", prepared.notes))
    prepared.train = (
        interleave_datasets(parts["train"], seed=seed, stopping_strategy="all_exhausted")
        if interleaved and len(names) > 1
        else concatenate_datasets(parts["train"])
    )
    prepared.validation = concatenate_datasets(parts["validation"])
    return prepared


def _subset(rows: Dataset, percent: float, seed: int) -> Dataset:
    if percent >= 100:
        return rows
    count = max(1, round(len(rows) * percent / 100))
    return rows.shuffle(seed=seed).select(range(count))


def _tokenised(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, domain: int, max_length: int, title: str, notes: list[str]
) -> Dataset:
    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = encode_example(tokenizer, row["prompt"], row["response"], max_length)
        if encoded is None:
            return {"input_ids": [], "attention_mask": [], "labels": [], "length": 0, "domain": domain}
        return {**encoded, "length": len(encoded["input_ids"]), "domain": domain}

    encoded = rows.map(encode, remove_columns=rows.column_names, desc=f"Tokenising {title}")
    fitting = encoded.filter(lambda length: length > 0, input_columns="length")
    dropped = len(encoded) - len(fitting)
    if not len(fitting):
        raise DatasetError(f"no prompt of {title} fits --max_seq_length {max_length}; raise it")
    cut = sum(labels[-1] != tokenizer.eos_token_id for labels in fitting["labels"])
    if dropped or cut:
        notes.append(
            f"{title}: of {len(encoded)} rows {dropped} dropped (prompt too long), {cut} cut at {max_length} tokens"
        )
    return fitting
