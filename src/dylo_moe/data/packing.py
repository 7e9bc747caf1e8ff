"""Packing of examples into full rows, and collation of rows into batches.

A packed row holds several examples that do not attend to each other: with the ``segment_ids`` the model restarts the
positions and masks the attention at each example, so that the loss is the same as without packing. A packed row is
kept as a list of example numbers, and joined when a batch is made.
"""

import hashlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from dylo_moe.core import IGNORE_INDEX
from dylo_moe.data.mixing import FILLER

_EXAMPLES_A_READ = 1000


class Item(TypedDict):
    """Row to train or evaluate on.

    Attributes:
        input_ids: Token ids of each example in the row.
        prompt_lengths: Number of prompt tokens of each example, which have no loss.
        domain: Number of the dataset that the examples came from.
        packed: Whether rows may hold several examples.
    """

    input_ids: list[NDArray[np.int32]]
    prompt_lengths: list[int]
    domain: int
    packed: bool


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Pack examples by best-fit decreasing: longest first, each into the fullest row that has room for it.

    Args:
        lengths: Tokens of each example, from 1 to ``capacity``: ``(examples,)``.
        capacity: Most tokens of a row.

    Returns:
        The example numbers of each row.
    """
    rows: list[list[int]] = []
    # rows by free space, and the amounts of free space that some row has
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = _FreeSpaceSet()
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        space = spaces.smallest_from(length)
        if space is None:
            row, space = len(rows), capacity
            rows.append([])
        else:
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces.remove(space)
        rows[row].append(example)
        left = space - length
        if left:
            spaces.add(left)
            rows_by_space[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


class _FreeSpaceSet:
    """Set of integers, stored as the bits of one integer, with a fast search for the smallest from a bound on."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, space: int) -> None:
        self._bits |= 1 << space

    def remove(self, space: int) -> None:
        self._bits &= ~(1 << space)

    def smallest_from(self, length: int) -> int | None:
        """Return the smallest member that is at least ``length``, or None."""
        above = self._bits >> length
        return length + (above & -above).bit_length() - 1 if above else None


class TokenRows(TorchDataset[Item]):
    """Tokenized examples as rows of one example each, or packed.

    Args:
        examples: Examples with the columns ``input_ids`` and ``prompt_length``.
        domains: Domain of each example: ``(examples,)``.
        lengths: Tokens of each example: ``(examples,)``.
        capacity: Most tokens of a packed row, which holds examples of one domain; None for no packing.

    Attributes:
        packed: Whether rows may hold several examples.
        domains: Domain of each row: ``(rows,)``.
        lengths: Tokens of each row: ``(rows,)``.
    """

    def __init__(
        self,
        examples: Dataset,
        domains: NDArray[np.int64],
        lengths: NDArray[np.int64],
        capacity: int | None = None,
    ) -> None:
        self.packed = capacity is not None
        self._examples = examples.with_format("numpy", columns=["input_ids", "prompt_length"])
        self._rows: list[NDArray[np.int64]] | None = None
        self.domains, self.lengths = domains, lengths
        if capacity is not None:
            # rows of one domain keep each dataset's share of the rows equal to its share of the tokens
            self._rows = [
                members[row]
                for members in (np.flatnonzero(domains == domain) for domain in np.unique(domains))
                for row in best_fit(lengths[members], capacity)
            ]
            self.domains = np.array([domains[row[0]] for row in self._rows])
            self.lengths = np.array([lengths[row].sum() for row in self._rows])

    def digest(self) -> str:
        """Return the SHA-256 of the rows: token ids, prompt lengths, domains and the examples of each row.

        It depends on the contents alone, so that it stays the same in a later version of this package.
        """
        digest = hashlib.sha256(self.domains.astype("<i8").tobytes())
        for row in self._rows or ():
            digest.update(np.asarray([len(row), *row], dtype="<i8").tobytes())
        for examples in self._examples.iter(_EXAMPLES_A_READ):
            lengths = [len(ids) for ids in examples["input_ids"]]
            digest.update(np.asarray([lengths, examples["prompt_length"]], dtype="<i8").tobytes())
            digest.update(np.concatenate(examples["input_ids"]).astype("<i4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    @override
    def __getitem__(self, index: int) -> Item:
        if index == FILLER:
            return Item(input_ids=[], prompt_lengths=[], domain=0, packed=self.packed)
        members = [index] if self._rows is None else self._rows[index]
        examples = self._examples[members]
        return Item(
            input_ids=list(examples["input_ids"]),
            prompt_lengths=examples["prompt_length"].tolist(),
            domain=int(self.domains[index]),
            packed=self.packed,
        )


class TokenCollator:
    """Collator of rows into batches.

    Args:
        pad_token_id: Token id that pads rows to the longest.
        flatten: Whether to concatenate the packed rows of a batch into a single row without padding. FlashAttention
            separates examples by their positions, and only in a batch of one row.
    """

    def __init__(self, pad_token_id: int, *, flatten: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.flatten = flatten

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return a batch of rows.

        Returns:
            Integer tensors ``(batch, seq)``: ``input_ids``; ``attention_mask``, 1 for real tokens; ``labels``, -100
            for tokens without a loss; for packed rows ``segment_ids``, which number the examples of a row from 1 and
            are 0 for padding. Also ``domain``, ``(items,)``, in the order of the items.
        """
        domain = torch.tensor([item["domain"] for item in items])
        packed = items[0]["packed"]
        if packed and self.flatten:
            items = [_concatenate(items)]
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
        # the first token of an example has no context to be predicted from
        first = max(1, prompt_length)
        row["labels"][start + first : end] = ids[first:]
        start = end


def _concatenate(items: Sequence[Item]) -> Item:
    return Item(
        input_ids=[ids for item in items for ids in item["input_ids"]],
        prompt_lengths=[length for item in items for length in item["prompt_lengths"]],
        domain=0,
        packed=True,
    )
