"""Joining examples into full rows, and rows into batches.

A packed row holds several examples. They do not see each other: the model is told where each begins
(``segment_ids``), counts positions anew and attends within it alone, so that the loss is what it would be without
packing. Nothing is written: a packed row is a list of examples, which are joined when a batch is made.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from dylo_moe.core.losses import IGNORE_INDEX
from dylo_moe.data.mixing import FILLER


class Item(TypedDict):
    """A row to train or evaluate on.

    Attributes:
        input_ids: Tokens of each of its examples.
        prompt_lengths: How many of them, in each, carry no loss.
        domain: The dataset that they came from.
        packed: Whether such rows may hold several examples.
    """

    input_ids: list[NDArray[np.int32]]
    prompt_lengths: list[int]
    domain: int
    packed: bool


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Best-fit decreasing: longest first, each into the row with the least room that it fits.

    Args:
        lengths: Of the examples, 1 to ``capacity``.
        capacity: Tokens of a row.

    Returns:
        The examples of each row.
    """
    rows: list[list[int]] = []
    # the rows by the room that they have left, and where there are such rows
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    used = _Rooms()
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        room = used.least(length)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = with_room[room].pop()
            if not with_room[room]:
                used.remove(room)
        rows[row].append(example)
        left = room - length
        if left:
            used.add(left)
            with_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


class _Rooms:
    """A set of numbers as the bits of one integer, which tells the least one from some number on."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, room: int) -> None:
        self._bits |= 1 << room

    def remove(self, room: int) -> None:
        self._bits &= ~(1 << room)

    def least(self, length: int) -> int | None:
        above = self._bits >> length
        return length + (above & -above).bit_length() - 1 if above else None


class TokenRows(TorchDataset[Item]):
    """Tokenised examples as rows, one example a row or packed.

    Args:
        examples: With the columns ``input_ids`` and ``prompt_length``.
        domains: The domain of each example.
        lengths: The tokens of each example.
        capacity: Packs examples of one domain into rows of at most so many tokens; None leaves each on its own.

    Attributes:
        packed: Whether rows may hold several examples.
        fingerprint: Tells the examples from others.
        domains: The domain of each row.
        lengths: The tokens of each row.
    """

    def __init__(
        self,
        examples: Dataset,
        domains: NDArray[np.int64],
        lengths: NDArray[np.int64],
        capacity: int | None = None,
    ) -> None:
        self.packed = capacity is not None
        self.fingerprint: str = examples._fingerprint
        self._examples = examples.with_format("numpy", columns=["input_ids", "prompt_length"])
        self._rows: list[NDArray[np.int64]] | None = None
        self.domains, self.lengths = domains, lengths
        if capacity is not None:
            # of one domain, so that the datasets' shares of the rows are their shares of the tokens
            self._rows = [
                members[row]
                for members in (np.flatnonzero(domains == domain) for domain in np.unique(domains))
                for row in best_fit(lengths[members], capacity)
            ]
            self.domains = np.array([domains[row[0]] for row in self._rows])
            self.lengths = np.array([lengths[row].sum() for row in self._rows])

    def __len__(self) -> int:
        return len(self.lengths)

    @override
    def __getitem__(self, index: int) -> Item:
        if index == FILLER:
            return Item(input_ids=[], prompt_lengths=[], domain=0, packed=self.packed)
        members = [index] if self._rows is None else self._rows[index]
        found = self._examples[members]
        return Item(
            input_ids=list(found["input_ids"]),
            prompt_lengths=found["prompt_length"].tolist(),
            domain=int(self.domains[index]),
            packed=self.packed,
        )


class TokenCollator:
    """Makes batches of rows.

    Args:
        pad_token_id: Fills rows up to the longest.
        flatten: Puts packed rows of a batch behind each other into one, without padding. FlashAttention tells
            examples apart by their positions only where the batch is one row.
    """

    def __init__(self, pad_token_id: int, *, flatten: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.flatten = flatten

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Makes a batch.

        Returns:
            Integer tensors ``(batch, seq)``: ``input_ids``; ``attention_mask``, 1 for real tokens; ``labels``, -100
            where there is no loss; and for packed rows ``segment_ids``, which count a row's examples from 1 and are 0
            for padding. And ``domain``, ``(batch,)``, as the rows were given.
        """
        domain = torch.tensor([item["domain"] for item in items])
        packed = items[0]["packed"]
        if packed and self.flatten:
            items = [_behind_each_other(items)]
        width = max(1, *(sum(map(len, item["input_ids"])) for item in items))
        batch = {
            "input_ids": torch.full((len(items), width), self.pad_token_id),
            "attention_mask": torch.zeros(len(items), width, dtype=torch.long),
            "labels": torch.full((len(items), width), IGNORE_INDEX),
        }
        if packed:
            batch["segment_ids"] = torch.zeros(len(items), width, dtype=torch.long)
        for row, item in enumerate(items):
            _fill({name: tensor[row] for name, tensor in batch.items()}, item)
        return {**batch, "domain": domain}


def _fill(row: dict[str, Tensor], item: Item) -> None:
    start = 0
    pairs = zip(item["input_ids"], item["prompt_lengths"], strict=True)
    for segment, (array, prompt_length) in enumerate(pairs, start=1):
        ids, end = torch.from_numpy(array), start + len(array)
        row["input_ids"][start:end] = ids
        row["attention_mask"][start:end] = 1
        if "segment_ids" in row:
            row["segment_ids"][start:end] = segment
        # nothing comes before the first token of an example that it could be predicted from
        first = max(1, prompt_length)
        row["labels"][start + first : end] = ids[first:]
        start = end


def _behind_each_other(items: Sequence[Item]) -> Item:
    return Item(
        input_ids=[ids for item in items for ids in item["input_ids"]],
        prompt_lengths=[length for item in items for length in item["prompt_lengths"]],
        domain=0,
        packed=True,
    )
