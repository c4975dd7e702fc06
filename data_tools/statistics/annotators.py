"""What each annotator did, with tests for random and one-sided clicking. Pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data_tools.statistics.columns import Columns
from data_tools.statistics.intervals import Estimate, fraction_of
from data_tools.statistics.judgements import AnnotatorVotes, AnswerPairs, agreement_with_majority
from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    from scipy import stats
else:
    stats = lazy("scipy.stats")  # half a second, which an import of rankings does without

LEVEL = 0.01
"""False discovery rate of the tests (Benjamini and Hochberg 1995)."""
VERDICTS = {
    "as the others": "agrees with the majority of the others about as often as they do, and more often than chance",
    "weaker": "agrees less often than the others do, but more often than chance",
    "random": "agrees less often than the others do, and no more often than someone who clicks at random",
    "reversed": "disagrees more often than chance would: the ranks may be reversed",
    "unclear": "undecided: too few pairs were also judged by others, or the others agree too little with each other",
}


@dataclass(frozen=True)
class AnnotatorReport:
    """One annotator. A fraction is None if there is no pair to compute it from."""

    name: str
    rankings: int
    agreement: Estimate | None
    """How often they order a pair as the majority of the others does, without ties."""
    first: Estimate | None
    """How often they prefer the answer shown earlier."""
    one_sided: bool
    """`first` is not one half (two-sided binomial test, corrected for the number of annotators)."""
    seconds: float | None
    """Median time per ranking."""
    verdict: str
    """One of `VERDICTS`."""


def annotators_of(pairs: AnswerPairs, votes: AnnotatorVotes) -> list[AnnotatorReport]:
    """Every named annotator: the doubtful ones first, then by the number of rankings."""
    columns = pairs.columns
    known = len(columns.annotators)
    own = columns.by_named_annotator
    volume = np.bincount(columns.annotator[own], minlength=known)
    hits, tries = agreement_with_others(columns, votes)
    verdicts = random_clicker_test(hits, tries)
    firsts, shown = _first_preferred(pairs)
    sided = one_sided_test(firsts, shown)
    seconds = _median_seconds(columns, own)
    found = [
        AnnotatorReport(
            columns.annotators[i], int(volume[i]), fraction_of(hits[i], tries[i]), fraction_of(firsts[i], shown[i]),
            bool(sided[i]), seconds.get(i), verdicts[i],
        )
        for i in range(known)
        if volume[i]
    ]  # fmt: skip
    order = ("reversed", "random", "weaker", "as the others", "unclear")
    return sorted(found, key=lambda one: (order.index(one.verdict), -one.rankings, one.name))


def independent_pairs(sizes: np.ndarray) -> np.ndarray:
    """The weight of a pair of a ranking of K answers, as a number of independent pairs: 9 / (2K + 5).

    The pairs of a ranking are correlated. Of K(K-1)/2 pairs in a random order, the number that agree with a given order
    has the variance K(K-1)(2K+5)/72 (Kendall 1938), which is (2K + 5) / 9 times that of as many coin tosses.
    """
    return 9 / (2 * sizes + 5)


def agreement_with_others(columns: Columns, votes: AnnotatorVotes) -> tuple[np.ndarray, np.ndarray]:
    """How often each annotator orders a pair as the majority of all others who judged it does.

    Pairs on which the others are even and the annotator's own ties are left out. A pair of a ranking of K answers has
    the weight `independent_pairs(K)`.

    Returns:
        Two (annotators,) float arrays: weighted agreements, weighted pairs.
    """
    weight = independent_pairs(columns.sizes[votes.row])
    return agreement_with_majority(votes.pair, votes.order, votes.annotator, len(columns.annotators), weight)


def random_clicker_test(hits: np.ndarray, tries: np.ndarray) -> list[str]:
    """Which annotators click at random, as one of `VERDICTS` for each.

    Two exact binomial tests. *As good as the others?* P(X <= hits) for X ~ Binomial(tries, p), p the rate at which all
    others agree with their majorities, corrected for the number of annotators (Benjamini and Hochberg 1995), at 1 %.
    *Better than chance?* P(X >= hits) for p = 1/2, at 1 %. An annotator who fails both is random; one who fails only
    the first is weaker; one who fails only the second is unclear. An annotator who agrees less often than chance,
    P(X <= hits) for p = 1/2 at 1 % after the same correction, is reversed.

    Args:
        hits, tries: (annotators,) as `agreement_with_others` gives them; rounded to whole trials.
    """
    total, right = tries.sum(), hits.sum()
    chance_of_others = (right - hits + 0.5) / (total - tries + 1)
    n, x = np.round(tries), np.minimum(np.round(hits), np.round(tries))
    judged = n > 0
    worse, below = np.ones(len(n)), np.ones(len(n))
    if judged.any():
        fitting = stats.binom.cdf(x, n, chance_of_others)[judged], stats.binom.cdf(x, n, 0.5)[judged]
        worse[judged], below[judged] = (stats.false_discovery_control(p) for p in fitting)
    above = stats.binom.sf(x - 1, n, 0.5) < LEVEL
    found = np.where(above, "as the others", "unclear")
    found = np.where(worse < LEVEL, np.where(above, "weaker", "random"), found)
    return [str(name) for name in np.where(below < LEVEL, "reversed", found)]


def one_sided_test(firsts: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(annotators,) bool: the preference for the first answer is not 1/2, by an exact two-sided binomial test.

    Corrected for the number of annotators (Benjamini and Hochberg 1995), at 1 %.
    """
    n, x = np.round(shown), np.minimum(np.round(firsts), np.round(shown))
    tails = np.minimum(stats.binom.cdf(x, n, 0.5), stats.binom.sf(x - 1, n, 0.5))
    found, tried = np.zeros(len(n), bool), n > 0
    if tried.any():
        found[tried] = stats.false_discovery_control(np.minimum(1, 2 * tails[tried])) < LEVEL
    return found


def _first_preferred(pairs: AnswerPairs) -> tuple[np.ndarray, np.ndarray]:
    """(annotators,) weights of ordered pairs with a known display order: those whose first answer is better, all."""
    columns = pairs.columns
    used = pairs.where((pairs.order != 0) & (columns.shown & columns.by_named_annotator)[pairs.row])
    weight = independent_pairs(columns.sizes[used.row])
    who, known = columns.annotator[used.row], len(columns.annotators)
    return np.bincount(who, weight * (used.order > 0), known), np.bincount(who, weight, known)


def _median_seconds(columns: Columns, own: np.ndarray) -> dict[int, float]:
    """Annotator -> median of the known seconds."""
    timed = own & ~np.isnan(columns.seconds)
    by_annotator = pd.Series(columns.seconds[timed]).groupby(columns.annotator[timed])
    return {int(who): float(np.median(seconds)) for who, seconds in by_annotator}
