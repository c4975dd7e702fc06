"""Rankings as votes on pairs of answers, in integer arrays whose size does not depend on the length of the texts.

Answers to a prompt are identified by their text, so their order in a ranking does not matter. Rankings of a prompt that
share an answer form one *pool*, whose answers can be ordered together; rankings that share none are in separate pools.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from data_tools.statistics.judgements import pair_arrays
from rlhf.core.errors import UserError
from rlhf.data.schema import SPLITS, Candidate, Ranking

UNNAMED = ""
"""The annotator of rankings that name none; any number of annotators."""


@dataclass(frozen=True)
class Votes:
    """V votes by A annotators on the answers (I items) of P pools.

    A ranking of K answers gives a vote on each of its K (K - 1) / 2 pairs. On a pair, a named annotator has one vote,
    the last one in the data; every vote of UNNAMED counts.
    """

    pool: np.ndarray
    """Int [I], ascending: the pool of each item. Within a pool, items are ordered by hash, not by rank."""
    first: np.ndarray
    """Int [V]: an item."""
    second: np.ndarray
    """Int [V]: another item of the same pool, always the greater index."""
    outcome: np.ndarray
    """Int [V]: 1 if the first is better, -1 if the second is, 0 for a tie."""
    annotator: np.ndarray
    """Int [V]: index in `annotators`."""
    annotators: tuple[str, ...]
    alone: np.ndarray
    """Int [I]: the item's rank if its pool has a single ranking, else 0."""


@dataclass(frozen=True)
class Ballots:
    """R rankings in the order of the data: their votes, and what is needed to write one ranking per pool."""

    votes: Votes
    start: np.ndarray
    """Int [R + 1]: ranking r has the entries start[r] to start[r + 1] of `item`, one per distinct answer."""
    item: np.ndarray
    """Int: an item of `votes`."""
    ids: np.ndarray
    """Uint64 [R]: the rankings' ids."""
    annotator: np.ndarray
    """Int [R]."""
    prompt: np.ndarray
    """Int [R]: the index of its prompt, in the order of appearance."""
    split: np.ndarray
    """Int [R]: 0 for none, else the index in `rlhf.data.schema.SPLITS` plus one."""
    rating: np.ndarray
    """Float [I]: mean of the item's ratings, NaN without any."""

    @property
    def pool(self) -> np.ndarray:
        """Int [R]: the pool of each ranking."""
        return self.votes.pool[self.item[self.start[:-1]]]


def distinct(record: Ranking) -> dict[str, tuple[Candidate, int]]:
    """Text -> candidate and rank, each text once. (The schema gives equal texts equal ranks.)"""
    found: dict[str, tuple[Candidate, int]] = {}
    for candidate, rank in zip(record.candidates, record.ranks):
        found.setdefault(candidate.text, (candidate, rank))
    return found


def collect(records: Iterator[Ranking]) -> Ballots:
    """Read rankings into arrays. Memory grows with candidates and prompts, not with text.

    Raises:
        UserError: There are none.
    """
    prompts: dict[str, int] = {}
    names: dict[str, int] = {}
    items: dict[bytes, int] = {}
    slots, ranks, ratings, start = array("q"), array("i"), array("d"), array("q", [0])
    ids, annotator, prompt, split = array("Q"), array("q"), array("q"), array("b")
    for record in records:
        for text, (candidate, rank) in distinct(record).items():
            key = hashlib.blake2b(f"{record.prompt_id} {text}".encode(), digest_size=16).digest()
            slots.append(items.setdefault(key, len(items)))
            ranks.append(rank)
            ratings.append(float("nan") if candidate.score is None else candidate.score)
        start.append(len(slots))
        ids.append(int(record.id, 16))
        annotator.append(names.setdefault(record.annotator, len(names)))
        prompt.append(prompts.setdefault(record.prompt_id, len(prompts)))
        split.append(0 if record.split is None else 1 + SPLITS.index(record.split))
    if not ids:
        raise UserError("no ranking to aggregate", remedy="`rlhf data stats` shows what a dataset holds.")
    # Items are ordered by hash, so that the order of the data does not matter.
    order = np.frombuffer(b"".join(key[:8] for key in items), np.uint64)
    held = {name: np.array(values) for name, values in (("start", start), ("ids", ids), ("annotator", annotator))}
    pool, item = _pools(np.array(slots), held["start"], order)
    votes = _votes(item, held["start"], np.array(ranks), held["annotator"], pool, tuple(names))
    rated = ~np.isnan(given := np.array(ratings))
    with np.errstate(invalid="ignore"):
        rating = np.bincount(item[rated], given[rated], len(pool)) / np.bincount(item[rated], minlength=len(pool))
    return Ballots(votes, item=item, prompt=np.array(prompt), split=np.array(split), rating=rating, **held)


def _pools(slots: np.ndarray, start: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pool of each item, pools in the order of their first appearance, and `slots` with the items' new indices."""
    count = len(order)
    sizes = np.diff(start)
    edges = (np.ones(len(slots)), (np.repeat(slots[start[:-1]], sizes), slots))
    _, component = sparse.csgraph.connected_components(sparse.csr_array(edges, shape=(count, count)), directed=False)
    _, appeared, component = np.unique(component, return_index=True, return_inverse=True)
    pool = np.argsort(np.argsort(appeared))[component]
    by_pool = np.lexsort((order, pool))
    number = np.empty(count, np.int64)
    number[by_pool] = np.arange(count)
    return pool[by_pool], number[slots]


def _votes(
    item: np.ndarray, start: np.ndarray, ranks: np.ndarray, annotator: np.ndarray, pool: np.ndarray,
    names: tuple[str, ...],
) -> Votes:  # fmt: skip
    ranking, one, other, sign = pair_arrays(start, item, ranks)
    sides = item[one], item[other]
    first, second, by = np.minimum(*sides), np.maximum(*sides), annotator[ranking]
    outcome = np.where(first == item[one], sign, -sign)
    order = np.lexsort((ranking, by, second, first))
    again = np.zeros(len(order), bool)  # followed by a later vote of the same annotator on the pair
    again[:-1] = np.all([np.diff(column[order]) == 0 for column in (first, second, by)], axis=0)
    named = np.array([name != UNNAMED for name in names])
    kept = order[~(again & named[by[order]])]
    single = np.bincount(pool[item[start[:-1]]], minlength=pool[-1] + 1) == 1
    alone = np.zeros(len(pool), np.int64)
    alone[item] = ranks
    alone[~single[pool]] = 0
    return Votes(pool, first[kept], second[kept], outcome[kept], by[kept], names, alone)


# ---- the pairs of a pool as matrices ---------------------------------------------------------------------------------


class WinMatrices:
    """The K x K matrices of all pools in one flat array; pools of the same size K are processed together.

    Args:
        pool: The pool of each item, ascending.
    """

    def __init__(self, pool: np.ndarray) -> None:
        self._pool = pool
        self.items = len(pool)
        """Number of items of all pools."""
        self.size = np.bincount(pool)
        """Int [P]: number of items of each pool."""
        self.start = np.cumsum(self.size) - self.size
        """Int [P]: the first item of each pool."""
        self.count = int((self.size**2).sum())
        """Number of cells of all matrices."""
        self._offset = np.cumsum(self.size**2) - self.size**2

    def of(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Index of the cell (row, column) of two items of a pool in the flat array."""
        pool = self._pool[row]
        start = self.start[pool]
        return self._offset[pool] + (row - start) * self.size[pool] + column - start

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each size K, the items [B, K] of the pools and the flat indices [B, K, K] of their matrices."""
        for size in np.unique(self.size):
            pools = np.flatnonzero(self.size == size)
            inner = np.arange(size * size).reshape(size, size)
            yield self.start[pools][:, None] + np.arange(size), self._offset[pools][:, None, None] + inner
