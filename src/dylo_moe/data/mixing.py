"""In which order the rows of several datasets are trained on.

The order of an epoch is a function of the seed and the epoch alone. So a run that is resumed skips what it has
seen, several processes share one order out among them, and two runs with one seed see the same rows.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler
from typing_extensions import override

FILLER = -1
"""An index that stands for no row; see ``MixingSampler``."""

MEGABATCH = 50
"""Batches among which rows of similar length are put together: enough to save padding, few enough to stay random."""


def counts_of(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many rows of each dataset an epoch has.

    The datasets' shares are proportional to ``size ** (1 / temperature)``: 1 takes each row once, infinity gives all
    datasets the same share (Arivazhagan et al. 2019, "Massively multilingual neural machine translation in the
    wild", section 4.2). The epoch is as long as it takes for every row to be seen.

    Args:
        sizes: Rows of each dataset; at least 1.
        temperature: 1 or more.
    """
    # relative to the largest, whose rows are seen once
    largest = max(sizes)
    power = 0.0 if math.isinf(temperature) else 1 / temperature
    return [max(size, round(largest * (size / largest) ** power)) for size in sizes]


class MixingSampler(Sampler[int]):
    """Draws rows of several datasets, each with its share in every stretch of an epoch.

    A dataset that is drawn more often than it has rows is gone through again, in a new order. An epoch is filled up
    to whole batches for all processes by ``FILLER``, so that no process trains on a row a second time or waits for
    one that does not come; a filler row has no tokens.

    Args:
        domains: The dataset of each row; rows are numbered as they stand here.
        temperature: See ``counts_of``.
        seed: Of every order.
        batch_size: Rows that one process trains on at a time.
        processes: How many there are.
        lengths: Of each row; rows of similar length are put into one batch. None leaves the order random.
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
        self.counts = counts_of([len(rows) for rows in self.rows], temperature)
        self.seed = seed
        self.batch_size = batch_size
        self.lengths = lengths
        self.epoch = 0
        self.fillers = -sum(self.counts) % (batch_size * processes) if processes > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; ``accelerate`` calls it at the beginning of each epoch."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        yield from [FILLER] * self.fillers

    def __len__(self) -> int:
        return sum(self.counts) + self.fillers

    def order(self) -> NDArray[np.int64]:
        """The rows of this epoch."""
        random = np.random.default_rng([self.seed, self.epoch])
        drawn = [_repeated(rows, count, random) for rows, count in zip(self.rows, self.counts, strict=True)]
        # the j-th of n rows of a dataset comes between j/n and (j+1)/n of the epoch
        places = [(np.arange(len(rows)) + random.random(len(rows))) / len(rows) for rows in drawn]
        order = np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]
        return order if self.lengths is None else self._by_length(order, random)

    def _by_length(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        assert self.lengths is not None
        batches: list[NDArray[np.int64]] = []
        size = self.batch_size * MEGABATCH
        for start in range(0, len(order), size):
            part = order[start : start + size]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            several = [part[at : at + self.batch_size] for at in range(0, len(part), self.batch_size)]
            # an incomplete batch has to be the epoch's last
            whole = [batch for batch in several if len(batch) == self.batch_size]
            random.shuffle(whole)
            batches += [*whole, *several[len(whole) :]]
        return np.concatenate(batches)


def _repeated(rows: NDArray[np.int64], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    rounds = [random.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(rounds)[:count]
