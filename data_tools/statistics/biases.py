"""Win rates that should be one half: of the longer answer, the first one shown, human answers, each author."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_tools.statistics.columns import Columns
from data_tools.statistics.consistency import fraction_by_prompt
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


def longer_win_rate(columns: Columns, pairs: AnswerPairs) -> Estimate | None:
    """The fraction of pairs in which the answer with more characters is better, without ties and equal lengths."""
    pairs, longer = _of_unequal_length(columns, pairs)
    return fraction_by_prompt(columns.prompt[pairs.row], longer == pairs.order)


def win_rates_by_length(columns: Columns, pairs: AnswerPairs) -> list[WinRate]:
    """`longer_win_rate` by the ratio of the longer answer's characters to the shorter one's."""
    pairs, longer = _of_unequal_length(columns, pairs)
    one, other = columns.chars[pairs.one], columns.chars[pairs.other]
    bins = np.digitize(np.maximum(one, other) / np.minimum(one, other), LENGTH_RATIOS)
    edges = ["1", *(f"{edge:g}" for edge in LENGTH_RATIOS)]
    names = [*map("-".join, zip(edges, edges[1:])), f"over {edges[-1]}"]
    return _win_rates(
        names, [bins == i for i in range(len(names))], columns, pairs, [longer == pairs.order] * len(names)
    )


def _of_unequal_length(columns: Columns, pairs: AnswerPairs) -> tuple[AnswerPairs, np.ndarray]:
    """The ordered pairs of unequal length, and 1 if `one` is longer, -1 if `other` is."""
    longer = np.sign(columns.chars[pairs.one] - columns.chars[pairs.other])
    used = (pairs.order != 0) & (longer != 0)
    return pairs.where(used), longer[used]


def _win_rates(
    names: list[str], groups: list[np.ndarray], columns: Columns, pairs: AnswerPairs, wins: list[np.ndarray]
) -> list[WinRate]:
    """The win rate of each group of pairs (a mask) that is not empty."""
    prompt = columns.prompt[pairs.row]
    rates = [fraction_by_prompt(prompt[group], win[group]) for group, win in zip(groups, wins)]
    return [WinRate(name, rate) for name, rate in zip(names, rates) if rate is not None]


def first_win_rate(columns: Columns, pairs: AnswerPairs) -> Estimate | None:
    """The fraction of ordered pairs with a known display order in which the answer shown earlier is better."""
    used = pairs.where((pairs.order != 0) & columns.shown[pairs.row])
    return fraction_by_prompt(columns.prompt[used.row], used.order > 0)


def person_win_rate(columns: Columns, pairs: AnswerPairs) -> Estimate | None:
    """The fraction of ordered pairs of a human and a model answer in which the human answer is better."""
    person, model = AUTHOR_KINDS.index("person"), AUTHOR_KINDS.index("model")
    one, other = columns.author_kind[pairs.one], columns.author_kind[pairs.other]
    used = (((one == person) & (other == model)) | ((one == model) & (other == person))) & (pairs.order != 0)
    wins = np.where(one == person, pairs.order > 0, pairs.order < 0)
    return fraction_by_prompt(columns.prompt[pairs.row[used]], wins[used])


def author_win_rates(columns: Columns, pairs: AnswerPairs) -> list[WinRate]:
    """The win rate of each author against other authors, the best first.

    The `MOST_AUTHORS` with most pairs; answers without an author's name are left out.
    """
    named = np.array([name != "" for name in columns.authors], bool)
    one, other = columns.author[pairs.one], columns.author[pairs.other]
    used = (pairs.order != 0) & (one != other) & named[one] & named[other]
    pairs, one, other = pairs.where(used), one[used], other[used]
    times = np.bincount(one, minlength=len(named)) + np.bincount(other, minlength=len(named))
    authors = np.argsort(-times, kind="stable")[:MOST_AUTHORS].tolist()
    groups = [(one == author) | (other == author) for author in authors]
    wins = [np.where(one == author, pairs.order > 0, pairs.order < 0) for author in authors]
    rates = _win_rates([columns.authors[author] for author in authors], groups, columns, pairs, wins)
    return sorted(rates, key=lambda item: -item.rate.value)
