"""The agreement of annotators, and the ceiling that it sets for the accuracy of a reward model on single choices."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.intervals import Estimate, clustered_fraction
from data_tools.statistics.judgements import AnnotatorVotes, pairs_of, votes_of

DIGITS = 6


def ceiling(agreement: np.ndarray) -> np.ndarray:
    """The best accuracy that any model can have against the choice of a single annotator: (1 + sqrt(2A - 1)) / 2.

    A is the probability that two annotators order a pair in the same way, without ties. Let a random annotator prefer
    the first answer of pair i with probability p_i, independently of the others. Two of them agree with probability
    A_i = p_i² + (1 - p_i)². The best that a model can do is to choose the answer that most prefer, which is right with
    probability q_i = max(p_i, 1 - p_i). From A_i = 1 - 2 q_i (1 - q_i) follows q_i = f(A_i) with
    f(A) = (1 + sqrt(2A - 1)) / 2. If all pairs are equally hard, the accuracy over pairs is f(A) exactly. Otherwise,
    since f is concave, E[q] = E[f(A_i)] <= f(E[A_i]) = f(A) (Jensen): f(A) is an upper bound.

    Args:
        agreement: A, any shape. At or below 0.5 (chance) the ceiling is 0.5.
    """
    return (1 + np.sqrt(np.maximum(2 * agreement - 1, 0))) / 2


def _counts(votes: AnnotatorVotes, ties: bool) -> np.ndarray:
    """(U, outcomes): votes for each outcome of each pair; a tie is one of them, or does not count."""
    return votes.counts() if ties else votes.counts()[:, [0, 2]]


def agreement_sums(votes: AnnotatorVotes, ties: bool = False) -> np.ndarray:
    """Each prompt's part in the pairwise agreement A = (sum of the first column) / (sum of the second).

    For a pair of answers with a votes one way and b the other, a vote agrees with another one, drawn at random, with
    probability (a(a-1) + b(b-1)) / ((a+b)(a+b-1)). A pair weighs as much as it has votes (like the units of
    Krippendorff's alpha), not pairs of votes, so that one pair of answers that fifty annotators judged does not
    dominate.

    Args:
        ties: A tie is a third outcome that agrees with ties only; otherwise ties are left out.

    Returns:
        (prompts, 2) float: expected agreeing votes; votes on pairs that have at least two.
    """
    counts = _counts(votes, ties)
    total = counts.sum(axis=1)
    agreeing = (counts * (counts - 1)).sum(axis=1) / np.maximum(total - 1, 1)
    return votes.per_prompt(np.stack([agreeing, np.where(total > 1, total, 0)], axis=1))


def agreement_estimate(votes: AnnotatorVotes, ties: bool = False) -> Estimate | None:
    """The pairwise agreement of `agreement_sums` with Wilson's interval, by prompt; None where no pair has two votes.

    `n` is the number of pairs that two or more annotators ordered. Of m votes on a pair the interval counts at most
    m - 1 trials: two votes are one comparison.
    """
    sums = agreement_sums(votes, ties)
    pairs = int((_counts(votes, ties).sum(axis=1) > 1).sum())
    return clustered_fraction(sums[:, 0], sums[:, 1], pairs, float(sums[:, 1].sum()) - pairs) if pairs else None


def ceiling_estimate(votes: AnnotatorVotes) -> Estimate | None:
    """The ceiling that `agreement_estimate` sets, with its interval."""
    found = agreement_estimate(votes)
    if found is None:
        return None
    value, low, high = ceiling(np.array([found.value, found.low, found.high], float)).tolist()
    return Estimate(value, low, high, found.n)


def agreement_facts(votes: AnnotatorVotes) -> dict[str, Any] | None:
    """The value of `agreement` in a manifest; see `agreement_of`."""
    found, best = agreement_estimate(votes), ceiling_estimate(votes)
    if found is None or best is None:
        return None
    counts = votes.counts()
    ordered = counts[:, 0] + counts[:, 2] > 1
    annotators = np.unique(votes.annotator[ordered[votes.pair] & (votes.order != 0)])
    return {
        "ceiling": round(best.value, DIGITS),
        "interval": [round(bound, DIGITS) for bound in (best.low, best.high) if bound is not None],
        "pairs": found.n,
        "annotators": len(annotators),
        "agreement": round(found.value, DIGITS),
    }


def agreement_of(gathered: Accumulator) -> dict[str, Any] | None:
    """How often the annotators of a dataset agree, and the ceiling that follows for a reward model.

    Rankings without an annotator's name are left out, since two of them may be by one person; so are aggregated ones.
    The same records give the same result.

    Returns:
        `ceiling` with its 95 % `interval` (Wilson, by prompt), `agreement` (the probability that two annotators
        who ordered a pair of answers ordered it in the same way, without ties), `pairs` (of answers that two or more
        annotators ordered) and `annotators` (their number). None if no two annotators ordered the same pair, and for
        other kinds of records than rankings.
    """
    columns = gathered.ranked_repeatedly()
    return None if columns is None else agreement_facts(votes_of(pairs_of(columns)))


class AgreementObserver:
    """Writes the agreement of a dataset of rankings into its manifest while the dataset is written.

    The entry `agreement` is what `agreement_of` returns, or null. Other kinds of records get no entry.

    Args:
        gathered: Takes the records.
        otherwise: The entry if the records themselves show no agreement, such as that of the parent dataset.
    """

    def __init__(self, gathered: Accumulator, otherwise: dict[str, Any] | None = None) -> None:
        self._gathered, self._otherwise = gathered, otherwise
        self.add = gathered.add

    def facts(self) -> dict[str, Any]:
        """The manifest's entry."""
        if "ranks" not in self._gathered.columns:
            return {}
        return {"agreement": agreement_of(self._gathered) or self._otherwise}
