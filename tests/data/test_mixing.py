"""Tests of the training order: shares, repetition, and independence of the number of processes."""

import math
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dylo_moe.data.mixing import FILLER, MixingSampler, epoch_counts


def domains_of(*sizes: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("sizes", [(7,), (300, 60), (300, 60, 41)])
def test_temperature_ranges_from_each_row_once_to_equal_shares(sizes: tuple[int, ...]) -> None:
    assert epoch_counts(sizes, 1) == list(sizes)
    assert epoch_counts(sizes, math.inf) == [max(sizes)] * len(sizes)
    between = epoch_counts(sizes, 2)
    assert all(
        one <= some <= most for one, some, most in zip(sizes, between, epoch_counts(sizes, math.inf), strict=True)
    )
    for size, count in zip(sizes, between, strict=True):
        assert count / max(between) == pytest.approx(math.sqrt(size / max(sizes)), abs=1 / max(sizes))


@pytest.mark.parametrize("temperature", [1.0, 3.0, math.inf])
def test_the_datasets_are_spread_evenly_over_an_epoch(temperature: float) -> None:
    domains = domains_of(500, 120, 33)
    sampler = MixingSampler(domains, temperature=temperature)
    drawn = domains[list(sampler)]
    assert len(drawn) == len(sampler) == sum(sampler.counts)
    for end in (100, 400, len(drawn)):
        for domain, count in enumerate(sampler.counts):
            assert abs((drawn[:end] == domain).sum() - end * count / len(drawn)) <= 3


def test_a_small_dataset_is_repeated_evenly_in_new_orders() -> None:
    sampler = MixingSampler(domains_of(100, 30), temperature=math.inf)
    order = sampler.order()
    small = order[order >= 100]
    assert len(small) == 100
    rounds = [small[start : start + 30].tolist() for start in (0, 30, 60)]
    assert all(sorted(one) == list(range(100, 130)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert set(Counter(small.tolist()).values()) == {3, 4}
    assert sorted(order[order < 100]) == list(range(100))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = MixingSampler(domains_of(50, 20), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert sorted(order(1, 0)) == sorted(order(2, 1)) == list(range(70))


def test_rows_of_similar_length_share_batches_and_none_is_lost() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 403)
    plain = MixingSampler(domains_of(403), batch_size=4)
    grouped = MixingSampler(domains_of(403), batch_size=4, lengths=lengths)
    assert sorted(grouped) == list(range(403))

    def padding(sampler: MixingSampler) -> float:
        order = sampler.order()
        batches = [lengths[order[start : start + 4]] for start in range(0, 400, 4)]
        return sum(float(batch.max() * 4 - batch.sum()) for batch in batches)

    assert padding(grouped) < 0.2 * padding(plain)


class Numbers:
    def __getitem__(self, index: int) -> int:
        return index


def loader(processes: int, process: int, batch_size: int, epoch: int = 0) -> DataLoader[int]:
    sampler = MixingSampler(
        domains_of(50, 13), temperature=math.inf, seed=3, batch_size=batch_size, processes=processes
    )
    plain: DataLoader[int] = DataLoader(Numbers(), batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
    prepared = prepare_data_loader(plain, num_processes=processes, process_index=process, put_on_device=False)
    prepared.set_epoch(epoch)
    return prepared


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_exactly_the_rows_of_one_process(processes: int, epoch: int) -> None:
    alone = [row for batch in loader(1, 0, 4 * processes, epoch) for row in batch]
    parts = [list(loader(processes, process, 4, epoch)) for process in range(processes)]
    assert len({len(part) for part in parts}) == 1, "every process makes as many steps"
    together = [row for step in zip(*parts, strict=True) for batch in step for row in batch]
    assert [row for row in together if row != FILLER] == alone
    assert together[len(alone) :] == [FILLER] * (len(together) - len(alone))
    assert Counter(alone)[0] == 1


def test_a_run_that_is_resumed_sees_the_rest_of_the_epoch() -> None:
    whole = list(loader(1, 0, 4, epoch=1))
    for seen in (1, 9, len(whole) - 1):
        resumed = skip_first_batches(loader(1, 0, 4, epoch=1), seen)
        resumed.set_epoch(1)
        assert list(resumed) == whole[seen:]
