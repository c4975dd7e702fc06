"""The order of training rows: whole batches, every row in every epoch, from seed and epoch alone."""

from __future__ import annotations

import random

import pytest

from rlhf.training.epoch_order import EpochSampler, epoch_order

LENGTHS = [random.Random(i).randrange(5, 500) for i in range(1000)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("rows, batch", [(1000, 8), (1000, 7), (5, 32), (1, 4), (32, 32)])
def test_an_epoch_is_whole_batches_with_every_row(rows: int, batch: int, lengths: list[int] | None) -> None:
    order = epoch_order(3, 0, rows, batch, lengths)
    assert len(order) % batch == 0 and len(order) - rows < max(batch, rows)
    counts = [order.count(row) for row in range(rows)]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_the_order_follows_from_seed_and_epoch() -> None:
    assert epoch_order(0, 1, 100, 8, None) == epoch_order(0, 1, 100, 8, None)
    orders = [epoch_order(seed, epoch, 100, 8, LENGTHS) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_grouping_by_length_saves_padding_but_not_always_in_the_same_batches() -> None:
    def batches(epoch: int, lengths: list[int] | None) -> list[list[int]]:
        order = epoch_order(0, epoch, 1000, 10, lengths)
        return [order[i : i + 10] for i in range(0, 1000, 10)]

    def padded(found: list[list[int]]) -> int:
        return sum(10 * max(LENGTHS[row] for row in batch) for batch in found)

    assert padded(batches(0, LENGTHS)) < 1.1 * sum(LENGTHS)
    assert padded(batches(0, None)) > 1.6 * sum(LENGTHS)
    first, second = ({frozenset(batch) for batch in batches(epoch, LENGTHS)} for epoch in (0, 1))
    assert len(first & second) < 5
    means = [sum(LENGTHS[row] for row in batch) for batch in batches(0, LENGTHS)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_the_sampler_goes_on_in_the_epoch_that_the_step_is_in() -> None:
    step = 0
    sampler = EpochSampler(5, 20, 8, None, lambda: step)
    assert len(sampler) == 24
    epochs = []
    for step in (0, 2, 3, 5, 6):  # noqa: B007 - the sampler reads it
        epochs.append(list(sampler))
    assert epochs[0] == epochs[1] == epoch_order(5, 0, 20, 8, None)
    assert epochs[2] == epochs[3] == epoch_order(5, 1, 20, 8, None)
    assert epochs[4] == epoch_order(5, 2, 20, 8, None)
