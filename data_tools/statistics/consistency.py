"""Do the rankings contradict each other? Pairs ranked both ways, cycles, ties. Pure functions of numbers."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from data_tools.statistics.columns import Columns
from data_tools.statistics.intervals import Estimate, clustered_fraction
from data_tools.statistics.judgements import Pairs, Votes, mixed, oriented


def fraction_by_prompt(prompt: np.ndarray, hit: np.ndarray) -> Estimate | None:
    """The share of hits, with an interval that takes what belongs to one prompt as one cluster.

    Args:
        prompt: (n,) any integers.
        hit: (n,) bool.
    """
    _, cluster = np.unique(prompt, return_inverse=True)
    return clustered_fraction(np.bincount(cluster, hit), np.bincount(cluster))


def ties(columns: Columns, pairs: Pairs) -> Estimate | None:
    """The share of all pairs of different answers that were ranked equal."""
    return fraction_by_prompt(columns.prompt[pairs.row], pairs.order == 0)


def contradictions(columns: Columns, pairs: Pairs) -> Estimate | None:
    """Of the pairs of answers that were ordered more than once, the share ordered both ways, by whomever.

    A pair of answers is that of one prompt; ties and aggregated rankings are left out.
    """
    pairs = pairs.where((pairs.order != 0) & ~columns.merged[pairs.row])
    name, order = oriented(columns, pairs)
    return _both_ways(columns, pairs, name, order)


def self_contradictions(columns: Columns, pairs: Pairs) -> Estimate | None:
    """Of the pairs that one named person ordered more than once, the share that they ordered both ways."""
    pairs = pairs.where((pairs.order != 0) & columns.by_named_person[pairs.row])
    name, order = oriented(columns, pairs)
    return _both_ways(columns, pairs, mixed(name ^ columns.annotator[pairs.row].astype(np.uint64)), order)


def contradictions_between(columns: Columns, votes: Votes) -> Estimate | None:
    """Of the pairs that two or more named people ordered, the share on which two of them differ."""
    counts = votes.counts()
    several = counts[:, 0] + counts[:, 2] > 1
    return fraction_by_prompt(votes.prompt[several], ((counts[:, 0] > 0) & (counts[:, 2] > 0))[several])


def contradicting(columns: Columns, pairs: Pairs, most: int = 5) -> list[tuple[int, int]]:
    """Up to `most` examples of pairs ordered both ways: numbers of two pairs of the same answers."""
    ordered = (pairs.order != 0) & ~columns.merged[pairs.row]
    there = np.flatnonzero(ordered)
    name, order = oriented(columns, pairs.where(ordered))
    (up, up_at), (down, down_at) = (np.unique(name[order == way], return_index=True) for way in (1, -1))
    _, one, other = np.intersect1d(up, down, assume_unique=True, return_indices=True)
    ups, downs = there[order == 1][up_at[one]], there[order == -1][down_at[other]]
    return list(zip(ups[:most].tolist(), downs[:most].tolist()))


def _both_ways(columns: Columns, pairs: Pairs, name: np.ndarray, order: np.ndarray) -> Estimate | None:
    _, first, group = np.unique(name, return_index=True, return_inverse=True)
    more = np.bincount(group, order > 0)
    times = np.bincount(group)
    several = times > 1
    both = (more > 0) & (more < times)
    return fraction_by_prompt(columns.prompt[pairs.row[first]][several], both[several])


def cycles(columns: Columns, pairs: Pairs) -> Estimate | None:
    """Of the prompts whose answers several rankings order, the share where the majorities run in a circle.

    Each pair of answers goes the way that most rankings of the prompt order it (none where that is even); a circle is
    A over B, B over C, C over A, or a longer one: a strongly connected component of more than one answer. One ranking
    alone has none, so prompts with two or more rankings and three or more answers so ordered are counted.
    """
    ranked, times = np.unique(columns.prompt[~columns.merged], return_counts=True)
    several = np.isin(columns.prompt, ranked[times > 1]) & ~columns.merged
    pairs = pairs.where(several[pairs.row])
    name, order = oriented(columns, pairs)
    _, first, group = np.unique(name, return_index=True, return_inverse=True)
    net = np.bincount(group, order)
    first, net = first[net != 0], net[net != 0]
    if not len(first):
        return None
    prompt = columns.prompt[pairs.row[first]]
    one, other = columns.answer[pairs.one[first]], columns.answer[pairs.other[first]]
    smaller_wins = net > 0
    winner = np.where(smaller_wins, np.minimum(one, other), np.maximum(one, other))
    loser = np.where(smaller_wins, np.maximum(one, other), np.minimum(one, other))
    both = np.concatenate([mixed(mixed(prompt) ^ winner), mixed(mixed(prompt) ^ loser)])
    _, at, node = np.unique(both, return_index=True, return_inverse=True)
    edges = sparse.coo_array((np.ones(len(first), bool), (node[: len(first)], node[len(first) :])), (len(at),) * 2)
    _, component = csgraph.connected_components(edges, directed=True, connection="strong")
    _, owner, answers = np.unique(np.concatenate([prompt, prompt])[at], return_inverse=True, return_counts=True)
    circular = np.bincount(owner, (np.bincount(component) > 1)[component]) > 0
    counted = answers > 2
    return clustered_fraction(circular[counted].astype(float), np.ones(counted.sum()))
