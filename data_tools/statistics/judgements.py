"""Rankings taken apart into judgements of pairs of answers, and those into one vote an annotator and pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data_tools.statistics.columns import Columns


@dataclass(frozen=True)
class Pairs:
    """Every pair of different answers within a ranking, P in all, in the order in which they stand there."""

    row: np.ndarray
    """(P,) int32: the ranking."""
    one: np.ndarray
    other: np.ndarray
    """(P,) int32: where the two stand among all answers; `one` stands before `other`."""
    order: np.ndarray
    """(P,) int8: 1 where `one` is better, -1 where `other` is, 0 for a tie."""

    def __len__(self) -> int:
        return len(self.row)

    def where(self, chosen: np.ndarray) -> Pairs:
        """Those that a (P,) bool mask chooses."""
        return Pairs(self.row[chosen], self.one[chosen], self.other[chosen], self.order[chosen])


def pairs_of(columns: Columns) -> Pairs:
    """The pairs of all rankings. Two answers of the same text are none."""
    rows, ones, others = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for size in np.unique(columns.sizes):
        alike = np.flatnonzero(columns.sizes == size)
        starts = columns.start[alike]
        for i, j in combinations(range(size), 2):
            different = columns.answer[starts + i] != columns.answer[starts + j]
            rows.append(alike[different].astype(np.int32))
            ones.append((starts[different] + i).astype(np.int32))
            others.append((starts[different] + j).astype(np.int32))
    row, one, other = np.concatenate(rows), np.concatenate(ones), np.concatenate(others)
    return Pairs(row, one, other, np.sign(columns.rank[other] - columns.rank[one]).astype(np.int8))


def oriented(columns: Columns, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """A name for each pair that does not depend on the order in which its answers stand, and the order under it.

    Returns:
        (P,) uint64, a hash of prompt and both answers, and (P,) int8, 1 where the answer of the smaller hash is better.
    """
    one, other = columns.answer[pairs.one], columns.answer[pairs.other]
    swapped = one > other
    low, high = np.where(swapped, other, one), np.where(swapped, one, other)
    name = mixed(mixed(mixed(columns.prompt[pairs.row]) ^ low) ^ high)
    return name, np.where(swapped, -pairs.order, pairs.order)


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), which spreads every bit over all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Votes:
    """One vote for each named annotator and pair of answers, V in all, over U pairs that two or more have judged.

    Someone who judged a pair several times has the vote that they gave most often, a tie where it is even.
    """

    pair: np.ndarray
    """(V,) int64: which of the U pairs; ascending."""
    annotator: np.ndarray
    """(V,) int32."""
    order: np.ndarray
    """(V,) int8: 1, 0 or -1, oriented alike for all votes on a pair."""
    row: np.ndarray
    """(V,) int32: the (first) ranking that it comes from."""
    prompt: np.ndarray
    """(U,) int64: number of each pair's prompt, from 0."""
    prompts: int
    """How many prompts these pairs belong to."""

    def counts(self) -> np.ndarray:
        """(U, 3): how many votes say -1, 0 and 1 on each pair."""
        found = np.zeros((len(self.prompt), 3), np.int64)
        np.add.at(found, (self.pair, self.order.astype(np.int64) + 1), 1)
        return found

    def per_prompt(self, values: np.ndarray) -> np.ndarray:
        """(prompts, columns): sums over each prompt's pairs of (U, columns) values."""
        columns = [np.bincount(self.prompt, values[:, i], self.prompts) for i in range(values.shape[1])]
        return np.stack(columns, axis=1)


def votes_of(columns: Columns, pairs: Pairs) -> Votes:
    """The votes of named annotators; aggregated rankings have none."""
    pairs = pairs.where(columns.by_named_person[pairs.row])
    name, order = oriented(columns, pairs)
    annotator = columns.annotator[pairs.row]
    place = np.lexsort((pairs.row, annotator, name))
    name, annotator, order, row = name[place], annotator[place], order[place], pairs.row[place]
    new = np.ones(len(name), bool)
    new[1:] = (name[1:] != name[:-1]) | (annotator[1:] != annotator[:-1])
    first = np.flatnonzero(new)
    vote = np.sign(np.add.reduceat(order.astype(np.int64), first)) if len(first) else np.zeros(0, np.int64)
    name, annotator, row = name[first], annotator[first], row[first]
    _, pair, times = np.unique(name, return_inverse=True, return_counts=True)
    several = times[pair] > 1
    used, pair = np.unique(pair[several], return_inverse=True)
    row, annotator, vote = row[several], annotator[several], vote[several]
    of_pair = np.zeros(len(used), np.uint64)
    of_pair[pair] = columns.prompt[row]
    prompts, prompt = np.unique(of_pair, return_inverse=True)
    return Votes(pair, annotator, vote.astype(np.int8), row, prompt, len(prompts))
