"""The order of the training data: a function of seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 50
"""Batches of similar length are cut from random pools of at most so many batches; an epoch has at least four pools, so
that the same rows do not meet each time."""


class EpochSampler(Sampler[int]):
    """Row numbers of one epoch in an order that follows from seed and epoch alone, whatever the number of processes.

    The last batch is filled up from the epoch's beginning, so that every optimizer step has the same number of rows.

    Args:
        seed: The run's.
        rows: How many there are.
        batch: Rows per optimizer step over all processes.
        lengths: Of the rows, to batch those of similar length together; None for a plain random order.
        step: Gives the optimizer steps done so far. They tell the epoch, so a resumed run goes on in the one it left.
    """

    def __init__(
        self, seed: int, rows: int, batch: int, lengths: Sequence[int] | None, step: Callable[[], int]
    ) -> None:
        self.seed, self.rows, self.batch, self.lengths, self.step = seed, rows, batch, lengths, step

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        epoch = self.step() * self.batch // len(self)
        return iter(epoch_order(self.seed, epoch, self.rows, self.batch, self.lengths))


def epoch_order(seed: int, epoch: int, rows: int, batch: int, lengths: Sequence[int] | None) -> list[int]:
    """The order of an epoch: whole batches of `batch` rows; see `EpochSampler`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    while len(order) % batch:
        order += order[: batch - len(order) % batch]
    if lengths is None:
        return order
    pool = min(POOL_BATCHES, max(1, len(order) // batch // 4)) * batch
    pools = [sorted(order[i : i + pool], key=lambda row: lengths[row]) for i in range(0, len(order), pool)]
    order = [row for rows_ in pools for row in rows_]
    shuffled = torch.randperm(len(order) // batch, generator=generator).tolist()
    return [row for i in shuffled for row in order[i * batch : (i + 1) * batch]]
