"""What all runs of the studies share: the base, tokenized rows, losses on held-out rows, and a file of results."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.mixture.tasks import Row
from dylo_moe.core import IGNORE_INDEX, load_base_model
from dylo_moe.data import TokenCollator, TokenRows, prepare_sample, template_of

MODEL = "demo"
MAX_LENGTH = 384
PROMPT_TOKENS = 224
"""Longer prompts lose their middle, so that both the task and the question at the end stay."""

BATCH = 8

Batch = dict[str, Tensor]


def load_base(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the base model of the studies."""
    return load_base_model(MODEL, dtype=dtype)


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, work: Path, limit: int, seed: int) -> TokenRows:
    """Return a seeded choice of rows as tokens; the same rows and seed give the same tokens.

    Rows without a prompt or an answer are left out, and those that still do not fit with the chat template around them.
    """
    rows = [_shortened(row, tokenizer) for row in rows if all(text.strip() for text in row.values())]
    rows = [row for row in rows if len(tokenizer("\n".join(row.values())).input_ids) <= MAX_LENGTH - 48]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = work / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(text)
    around = template_of("auto", tokenizer)
    return prepare_sample(f"rows={file}", tokenizer, limit, max_length=MAX_LENGTH, template=around, seed=seed)


def _shortened(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    (prompt, text), (answer, output) = row.items()
    ids = tokenizer(text).input_ids
    if len(ids) > PROMPT_TOKENS:
        half = PROMPT_TOKENS // 2
        text = f"{tokenizer.decode(ids[:half])} ... {tokenizer.decode(ids[-half:])}"
    return {prompt: text, answer: output}


def first_rows(tokens: TokenRows, enough: int, at_least: int) -> list[Any]:
    """Return the first rows that have so many tokens together, but at least so many rows if there are."""
    lengths = [int(length) for length in tokens.lengths]
    number = next((n for n in range(at_least, len(lengths)) if sum(lengths[:n]) >= enough), len(lengths))
    return [tokens[index] for index in range(number)]


def batches_of(rows: Any, tokenizer: PreTrainedTokenizerBase, size: int = BATCH) -> list[Batch]:
    """Return rows in their order as padded batches."""
    batches = DataLoader(rows, batch_size=size, collate_fn=TokenCollator(tokenizer.pad_token_id))
    return [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in batches]


def inputs_of(batch: Batch) -> Batch:
    """Return what a model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def answers_of(batch: Batch) -> Tensor:
    """Return which positions predict a token of an answer: ``(batch, seq)`` bool."""
    return F.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1))


@contextmanager
def answers_only(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Let the head read only the positions that predict an answer, so that logits are ``(answer tokens, vocabulary)``.

    The other logits would be thrown away, and are a fifth of the work.
    """
    answers = answers_of(batch)

    def select(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][answers], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def answer_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of each answer token in nats, from the logits of ``answers_only``."""
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:][answers_of(batch)[:, :-1]], reduction="none")


class Results:
    """A result file that gains one run at a time, so that an interrupted study goes on where it stopped.

    Args:
        path: The file.
        environment: Machine and versions.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment, "runs": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())

    def run(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return what a run found: from the file, or measured now and written to it."""
        runs = self.content["runs"]
        if key not in runs:
            runs[key] = json.loads(json.dumps(measure()))  # as it is when it comes from the file
            part = self.path.with_suffix(".part")
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(found)}" for key, found in sorted(runs.items()))
            environment = json.dumps(self.content["environment"])
            part.write_text(f'{{\n "environment": {environment},\n "runs": {{\n{lines}\n }}\n}}\n')
            os.replace(part, self.path)
        return runs[key]


def best_on_ladder(ladder: Sequence[float], start: int, measure: Callable[[float], float]) -> float:
    """Return the value with the lowest measure, walking from a start until both its neighbours are worse.

    Raises:
        ValueError: The best value is an end of the ladder.
    """
    place = start
    while True:
        if not 0 < place < len(ladder) - 1:
            raise ValueError(f"the best value, {ladder[place]:g}, is an end of {ladder}; widen the ladder")
        lower, here, upper = (measure(ladder[index]) for index in (place - 1, place, place + 1))
        if here <= min(lower, upper):
            return ladder[place]
        place += 1 if upper < lower else -1
