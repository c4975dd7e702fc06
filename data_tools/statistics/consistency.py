"""How often rankings contradict each other: pairs ordered both ways, cycles, ties. Pure functions of arrays."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from data_tools.statistics.intervals import Estimate, clustered_fraction, fraction_by_prompt
from data_tools.statistics.judgements import AnnotatorVotes, AnswerPairs, mixed, oriented


def ties(pairs: AnswerPairs) -> Estimate | None:
    """The fraction of all pairs of different answers that were ranked equal."""
    return pairs.fraction(pairs.order == 0)


def contradictions(pairs: AnswerPairs) -> Estimate | None:
    """Of the pairs of answers to a prompt that were ordered more than once, the fraction ordered both ways.

    The annotators do not matter. Ties and aggregated rankings are left out.
    """
    return _both_ways(pairs, ~pairs.columns.merged, np.zeros(len(pairs.columns), np.int32))


def self_contradictions(pairs: AnswerPairs) -> Estimate | None:
    """Of the pairs that one named annotator ordered more than once, the fraction that they ordered both ways."""
    return _both_ways(pairs, pairs.columns.by_named_annotator, pairs.columns.annotator)


def contradictions_between(votes: AnnotatorVotes) -> Estimate | None:
    """Of the pairs that two or more named annotators ordered, the fraction on which two of them differ."""
    counts = votes.counts()
    several = counts[:, 0] + counts[:, 2] > 1
    return fraction_by_prompt(votes.prompt[several], ((counts[:, 0] > 0) & (counts[:, 2] > 0))[several])


def contradicting(pairs: AnswerPairs) -> list[tuple[int, int]]:
    """Up to five examples of pairs ordered both ways, each as the indices of two pairs of the same answers."""
    ordered = (pairs.order != 0) & ~pairs.columns.merged[pairs.row]
    index = np.flatnonzero(ordered)
    key, order = oriented(pairs.where(ordered))
    (up, up_at), (down, down_at) = (np.unique(key[order == way], return_index=True) for way in (1, -1))
    _, one, other = np.intersect1d(up, down, assume_unique=True, return_indices=True)
    ups, downs = index[order == 1][up_at[one]], index[order == -1][down_at[other]]
    return list(zip(ups[:5].tolist(), downs[:5].tolist()))


def _both_ways(pairs: AnswerPairs, used: np.ndarray, who: np.ndarray) -> Estimate | None:
    """Of the pairs that were ordered more than once in the `used` records by one `who`, those ordered both ways."""
    pairs = pairs.where((pairs.order != 0) & used[pairs.row])
    key, order = oriented(pairs)
    _, first, group = np.unique(mixed(key ^ who[pairs.row].astype(np.uint64)), return_index=True, return_inverse=True)
    more, times = np.bincount(group, order > 0), np.bincount(group)
    several = times > 1
    return pairs.where(first[several]).fraction(((more > 0) & (more < times))[several])


def cycles(pairs: AnswerPairs) -> Estimate | None:
    """Of the prompts whose answers several rankings order, the fraction in which the majorities form a cycle.

    Each pair of answers is an edge in the direction that most rankings of the prompt order it (no edge if that is
    even). A cycle is A over B, B over C, C over A, or a longer one: a strongly connected component of more than one
    answer. A single ranking has no cycle, so only prompts with two or more rankings and three or more answers on edges
    are counted.
    """
    columns = pairs.columns
    ranked, times = np.unique(columns.prompt[~columns.merged], return_counts=True)
    several = np.isin(columns.prompt, ranked[times > 1]) & ~columns.merged
    pairs = pairs.where(several[pairs.row])
    key, order = oriented(pairs)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    net = np.bincount(group, order)
    pairs, net = pairs.where(first[net != 0]), net[net != 0]
    if not len(net):
        return None
    prompt, (one, other) = pairs.prompt, pairs.both(columns.answer)
    pair = np.minimum(one, other), np.maximum(one, other)
    winner, loser = np.where(net > 0, pair, pair[::-1])
    both = np.concatenate([mixed(mixed(prompt) ^ winner), mixed(mixed(prompt) ^ loser)])
    _, at, node = np.unique(both, return_index=True, return_inverse=True)
    edges = sparse.coo_array((np.ones(len(net), bool), np.split(node, 2)), (len(at),) * 2)
    _, component = csgraph.connected_components(edges, directed=True, connection="strong")
    _, owner, answers = np.unique(np.concatenate([prompt, prompt])[at], return_inverse=True, return_counts=True)
    in_cycle = np.bincount(owner, (np.bincount(component) > 1)[component]) > 0
    counted = answers > 2
    return clustered_fraction(in_cycle[counted].astype(float), np.ones(counted.sum()))
