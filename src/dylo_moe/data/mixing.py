"""Training order of the rows of several datasets.

The order of an epoch depends on the seed and the epoch alone. A resumed run can therefore skip the rows that it has
seen, several processes can share one order, and two runs with the same seed see the same rows.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler
from typing_extensions import override

FILLER = -1
"""Index of an empty row; see ``MixingSampler``."""

_MEGABATCH = 50
"""Number of batches among which rows are sorted by length: many save padding, few keep the order random."""


def epoch_counts(sizes: Sequence[int], temperature: float) -> list[int]:
    """Return the number of rows of each dataset in an epoch.

    The datasets' shares are proportional to ``size ** (1 / temperature)``: 1 takes each row once, infinity gives all
    datasets the same share (Arivazhagan et al. 2019, "Massively multilingual neural machine translation in the
    wild", section 4.2). The epoch is the shortest in which every row is seen.

    Args:
        sizes: Number of rows of each dataset, at least 1.
        temperature: Sampling temperature, at least 1.
    """
    # relative to the largest dataset, whose rows are seen once
    largest = max(sizes)
    power = 0.0 if math.isinf(temperature) else 1 / temperature
    return [max(size, round(largest * (size / largest) ** power)) for size in sizes]


class MixingSampler(Sampler[int]):
    """Sampler of rows of several datasets that spreads each dataset evenly over an epoch.

    A dataset that is drawn more often than it has rows is repeated, each time in a new order. An epoch is padded with
    ``FILLER`` to whole batches for all processes, so that no process repeats a row or waits for another one; a filler
    row has no tokens.

    Args:
        domains: Dataset of each row: ``(rows,)``.
        temperature: Sampling temperature; see ``epoch_counts``.
        seed: Seed of the orders of all epochs.
        batch_size: Number of rows in a batch of one process.
        processes: Number of processes.
        lengths: Tokens of each row, ``(rows,)``, to put rows of similar length into one batch; None for a random order.
    """

    def __init__(
        self,
        domains: NDArray[np.int64],
        *,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 1,
        processes: int = 1,
        lengths: NDArray[np.int64] | None = None,
    ) -> None:
        self.rows = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
        self.counts = epoch_counts([len(rows) for rows in self.rows], temperature)
        self.seed = seed
        self.batch_size = batch_size
        self.lengths = lengths
        self.epoch = 0
        self.fillers = -sum(self.counts) % (batch_size * processes) if processes > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that decides the order; ``accelerate`` calls this at the start of each epoch."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        yield from [FILLER] * self.fillers

    def __len__(self) -> int:
        return sum(self.counts) + self.fillers

    def order(self) -> NDArray[np.int64]:
        """Return the row numbers of this epoch, without fillers."""
        random = np.random.default_rng([self.seed, self.epoch])
        drawn = []
        for rows, count in zip(self.rows, self.counts, strict=True):
            rounds = [random.permutation(rows) for _ in range(-(-count // len(rows)))]
            drawn.append(np.concatenate(rounds)[:count])
        # row j of a dataset's n is placed between j/n and (j+1)/n of the epoch
        positions = [(np.arange(len(rows)) + random.random(len(rows))) / len(rows) for rows in drawn]
        order = np.concatenate(drawn)[np.argsort(np.concatenate(positions), kind="stable")]
        return order if self.lengths is None else self._by_length(order, random)

    def _by_length(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        assert self.lengths is not None
        batches: list[NDArray[np.int64]] = []
        size = self.batch_size * _MEGABATCH
        for start in range(0, len(order), size):
            part = order[start : start + size]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            parts = [part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size)]
            # an incomplete batch must be the last of the epoch
            full = [batch for batch in parts if len(batch) == self.batch_size]
            random.shuffle(full)
            batches += [*full, *parts[len(full) :]]
        return np.concatenate(batches)
