"""The order of the training data: a function of seed and epoch only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

POOL_BATCHES = 50
"""Most batches in a random pool, from which batches of similar length are cut. An epoch has at least four pools, so
that batches differ between epochs."""


class StepRows:
    """The rows of each optimizer step, whatever the number of processes; `steps` is the number of steps in an epoch.

    The last batch of an epoch is filled up from the epoch's beginning, so that every step has the same number of rows.

    Args:
        seed: The run's seed.
        rows: Number of rows.
        batch: Rows per optimizer step over all processes.
        lengths: Lengths of the rows, to batch similar ones together; None for a plain random order.
    """

    def __init__(self, seed: int, rows: int, batch: int, lengths: Sequence[int] | None) -> None:
        self.seed, self.rows, self.batch, self.lengths = seed, rows, batch, lengths
        self.steps = math.ceil(rows / batch)
        self._epoch, self._order = -1, [0]

    def __getitem__(self, step: int) -> list[int]:
        """The row numbers of a step, which is counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.rows, self.batch, self.lengths)
        return self._order[place * self.batch :][: self.batch]


def epoch_order(seed: int, epoch: int, rows: int, batch: int, lengths: Sequence[int] | None) -> list[int]:
    """The order of an epoch: whole batches of `batch` rows; see `StepRows`."""
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
