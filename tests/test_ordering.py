"""The order of training rows: whole batches, every row in every epoch, from seed and epoch alone."""

from __future__ import annotations

import random

import pytest

from rlhf.training.epoch_order import StepRows, epoch_order

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


def test_a_step_has_the_rows_of_its_epoch_whatever_was_asked_before() -> None:
    rows = StepRows(5, 20, 8, None)
    assert rows.steps == 3
    orders = [epoch_order(5, epoch, 20, 8, None) for epoch in range(3)]
    for step in (0, 2, 3, 5, 6, 1):
        epoch, place = divmod(step, 3)
        assert rows[step] == orders[epoch][8 * place : 8 * place + 8]
