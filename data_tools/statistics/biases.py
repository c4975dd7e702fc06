"""Win rates that should be one half: of the longer answer, the first one shown, human answers, each author."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_tools.statistics.intervals import Estimate
from data_tools.statistics.judgements import AnswerPairs
from rlhf.data.schema import AUTHOR_KINDS

LENGTH_RATIOS = (1.1, 1.25, 1.5, 2.0, 4.0)
"""Edges of the bins of `win_rates_by_length`."""
MOST_AUTHORS = 30


class WinRate(NamedTuple):
    """The win rate of one of several groups."""

    name: str
    rate: Estimate


def longer_win_rate(pairs: AnswerPairs) -> Estimate | None:
    """The fraction of pairs in which the answer with more characters is better, without ties and equal lengths."""
    pairs, longer = _of_unequal_length(pairs)
    return pairs.fraction(longer == pairs.order)


def win_rates_by_length(pairs: AnswerPairs) -> list[WinRate]:
    """`longer_win_rate` by the ratio of the longer answer's characters to the shorter one's."""
    pairs, longer = _of_unequal_length(pairs)
    chars = pairs.both(pairs.columns.chars)
    bins = np.digitize(np.maximum(*chars) / np.minimum(*chars), LENGTH_RATIOS)
    edges = ["1", *(f"{edge:g}" for edge in LENGTH_RATIOS)]
    names = [*map("-".join, zip(edges, edges[1:])), f"over {edges[-1]}"]
    return _win_rates(pairs, {name: (bins == i, longer == pairs.order) for i, name in enumerate(names)})


def _of_unequal_length(pairs: AnswerPairs) -> tuple[AnswerPairs, np.ndarray]:
    """The ordered pairs of unequal length, and 1 if `one` is longer, -1 if `other` is."""
    longer = np.sign(np.subtract(*pairs.both(pairs.columns.chars)))
    used = (pairs.order != 0) & (longer != 0)
    return pairs.where(used), longer[used]


def _win_rates(pairs: AnswerPairs, groups: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[WinRate]:
    """The win rate of each group of pairs (a mask, and who wins) that is not empty."""
    rates = {name: pairs.where(group).fraction(wins[group]) for name, (group, wins) in groups.items()}
    return [WinRate(name, rate) for name, rate in rates.items() if rate is not None]


def first_win_rate(pairs: AnswerPairs) -> Estimate | None:
    """The fraction of ordered pairs with a known display order in which the answer shown earlier is better."""
    used = pairs.where((pairs.order != 0) & pairs.columns.shown[pairs.row])
    return used.fraction(used.order > 0)


def person_win_rate(pairs: AnswerPairs) -> Estimate | None:
    """The fraction of ordered pairs of a human and a model answer in which the human answer is better."""
    person, model = AUTHOR_KINDS.index("person"), AUTHOR_KINDS.index("model")
    one, other = pairs.both(pairs.columns.author_kind)
    used = (((one == person) & (other == model)) | ((one == model) & (other == person))) & (pairs.order != 0)
    wins = np.where(one == person, pairs.order > 0, pairs.order < 0)
    return pairs.where(used).fraction(wins[used])


def author_win_rates(pairs: AnswerPairs) -> list[WinRate]:
    """The win rate of each author against other authors, the best first.

    The `MOST_AUTHORS` with most pairs; answers without an author's name are left out.
    """
    columns = pairs.columns
    named = np.array([name != "" for name in columns.authors], bool)
    one, other = pairs.both(columns.author)
    pairs = pairs.where((pairs.order != 0) & (one != other) & named[one] & named[other])
    one, other = pairs.both(columns.author)
    times = np.bincount(np.concatenate([one, other]), minlength=len(named))
    groups = {
        columns.authors[author]: (
            (one == author) | (other == author),
            np.where(one == author, pairs.order > 0, pairs.order < 0),
        )
        for author in np.argsort(-times, kind="stable")[:MOST_AUTHORS].tolist()
    }
    return sorted(_win_rates(pairs, groups), key=lambda item: -item.rate.value)
