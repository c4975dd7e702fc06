"""What wins that should not: length, place, who wrote it. Pure functions of numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_tools.statistics.columns import Columns
from data_tools.statistics.consistency import fraction_by_prompt
from data_tools.statistics.intervals import Estimate
from data_tools.statistics.judgements import Pairs
from rlhf.data.schema import AUTHOR_KINDS

TIMES_LONGER = (1.1, 1.25, 1.5, 2.0, 4.0)
"""Edges of the bins of `wins_by_length`."""
MOST_AUTHORS = 30


class Share(NamedTuple):
    """A share for one of several groups."""

    name: str
    share: Estimate


def longer_wins(columns: Columns, pairs: Pairs) -> Estimate | None:
    """The share of pairs, ties and equal lengths aside, where the answer of more characters is better."""
    pairs, longer = _of_unequal_length(columns, pairs)
    return fraction_by_prompt(columns.prompt[pairs.row], longer == pairs.order)


def wins_by_length(columns: Columns, pairs: Pairs) -> list[Share]:
    """`longer_wins` by how many times the characters of the shorter answer the longer one has."""
    pairs, longer = _of_unequal_length(columns, pairs)
    one, other = columns.chars[pairs.one], columns.chars[pairs.other]
    times = np.maximum(one, other) / np.minimum(one, other)
    bins = np.digitize(times, TIMES_LONGER)
    found = []
    for number in range(len(TIMES_LONGER) + 1):
        low = TIMES_LONGER[number - 1] if number else 1
        name = f"{low:g}-{TIMES_LONGER[number]:g}" if number < len(TIMES_LONGER) else f"over {low:g}"
        here = bins == number
        share = fraction_by_prompt(columns.prompt[pairs.row[here]], (longer == pairs.order)[here])
        found += [Share(name, share)] if share else []
    return found


def _of_unequal_length(columns: Columns, pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """The ordered pairs of unequal length, and 1 where `one` is longer, -1 where `other` is."""
    longer = np.sign(columns.chars[pairs.one] - columns.chars[pairs.other])
    used = (pairs.order != 0) & (longer != 0)
    return pairs.where(used), longer[used]


def first_wins(columns: Columns, pairs: Pairs) -> Estimate | None:
    """The share of ordered pairs, of rankings that keep the order shown, where the answer shown earlier is better."""
    used = pairs.where((pairs.order != 0) & columns.shown[pairs.row])
    return fraction_by_prompt(columns.prompt[used.row], used.order > 0)


def person_wins(columns: Columns, pairs: Pairs) -> Estimate | None:
    """The share of ordered pairs of a person's and a model's answer where the person's is better."""
    person, model = AUTHOR_KINDS.index("person"), AUTHOR_KINDS.index("model")
    one, other = columns.author_kind[pairs.one], columns.author_kind[pairs.other]
    mixed_pair = ((one == person) & (other == model)) | ((one == model) & (other == person))
    used = mixed_pair & (pairs.order != 0)
    wins = np.where(one == person, pairs.order > 0, pairs.order < 0)
    return fraction_by_prompt(columns.prompt[pairs.row[used]], wins[used])


def author_wins(columns: Columns, pairs: Pairs) -> list[Share]:
    """The share of ordered pairs with another author's answer that each author won, best first.

    The `MOST_AUTHORS` with most pairs; answers whose author has no name are left out.
    """
    named = np.array([name != "" for name in columns.authors], bool)
    one, other = columns.author[pairs.one], columns.author[pairs.other]
    used = (pairs.order != 0) & (one != other) & named[one] & named[other]
    pairs, one, other = pairs.where(used), one[used], other[used]
    times = np.bincount(one, minlength=len(named)) + np.bincount(other, minlength=len(named))
    found = []
    for author in np.argsort(-times, kind="stable")[:MOST_AUTHORS]:
        here = (one == author) | (other == author)
        won = np.where(one == author, pairs.order > 0, pairs.order < 0)[here]
        share = fraction_by_prompt(columns.prompt[pairs.row[here]], won)
        found += [Share(columns.authors[author], share)] if share else []
    return sorted(found, key=lambda item: -item.share.value)
