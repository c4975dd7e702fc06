"""The agreement ceiling: how well a reward model can do at best on a choice that one annotator made."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.intervals import bootstrapped, ratio
from data_tools.statistics.judgements import Votes, pairs_of, votes_of

DIGITS = 6


def ceiling(agreement: np.ndarray) -> np.ndarray:
    """The best accuracy that any model can have against the choice of a single annotator: (1 + sqrt(2A - 1)) / 2.

    A is the probability that two annotators order a pair alike, ties aside. Let a random annotator prefer the first
    answer of pair i with probability p_i, independently of the others. Two order it alike with probability
    A_i = p_i² + (1 - p_i)², and the best that a model can do is to name the answer that most prefer, which is right
    with probability q_i = max(p_i, 1 - p_i). From A_i = 1 - 2 q_i (1 - q_i) follows q_i = f(A_i) with
    f(A) = (1 + sqrt(2A - 1)) / 2. Where all pairs are equally hard, the accuracy over pairs is f(A) exactly; else,
    since f is concave, E[q] = E[f(A_i)] <= f(E[A_i]) = f(A) (Jensen): f(A) is an upper bound.

    Args:
        agreement: A, any shape. At or below 0.5, what chance gives, the ceiling is 0.5.
    """
    return (1 + np.sqrt(np.maximum(2 * agreement - 1, 0))) / 2


def agreement_sums(votes: Votes) -> np.ndarray:
    """Each prompt's share in the pairwise agreement A = (sum of the first column) / (sum of the second).

    Of a pair of answers with a votes one way and b the other, a vote has the company of another one, drawn at random,
    with probability (a(a-1) + b(b-1)) / ((a+b)(a+b-1)); pairs weigh as many votes as they have (as the units of
    Krippendorff's alpha do), so that an answer pair that fifty people judged does not drown the others. Ties, on
    either side, are left out.

    Returns:
        (prompts, 2) float: votes in company, votes with at least one other beside them.
    """
    counts = votes.counts()
    less, more = counts[:, 0], counts[:, 2]
    total = less + more
    with np.errstate(divide="ignore", invalid="ignore"):
        company = (less * (less - 1) + more * (more - 1)) / (total - 1)
    several = total > 1
    return votes.per_prompt(np.stack([np.where(several, company, 0), np.where(several, total, 0)], axis=1))


def agreement_facts(votes: Votes) -> dict[str, Any] | None:
    """The value of `agreement` in a manifest, from the votes: None where no pair was ordered by two people."""
    sums = agreement_sums(votes)
    sums = sums[sums[:, 1] > 0]
    found = bootstrapped(sums, ratio)
    if found is None:
        return None
    bounds = [found.value if bound is None else bound for bound in (found.low, found.high)]
    counts = votes.counts()
    ordered = counts[:, 0] + counts[:, 2] > 1
    people = np.unique(votes.annotator[ordered[votes.pair] & (votes.order != 0)])
    return {
        "ceiling": round(float(ceiling(np.array(found.value))), DIGITS),
        "interval": [round(float(bound), DIGITS) for bound in ceiling(np.array(bounds))],
        "pairs": int(ordered.sum()),
        "annotators": len(people),
        "agreement": round(found.value, DIGITS),
    }


def agreement_of(gathered: Accumulator) -> dict[str, Any] | None:
    """How far the annotators of a dataset agree, and the ceiling that follows for a reward model.

    Rankings that name no annotator are left out, since two of them may be one person's; so are aggregated ones. The
    same records give the same metrics.

    Returns:
        `ceiling` with its 95 % `interval` (bootstrap over prompts), `agreement` (the probability that two people who
        ordered the same pair of answers ordered it alike, ties aside), `pairs` (of answers that two or more people
        ordered) and `annotators` (how many people that were). None where no pair was ordered by two people, and for a
        dataset of another kind than rankings.
    """
    columns = gathered.ranked_repeatedly()
    return None if columns is None else agreement_facts(votes_of(columns, pairs_of(columns)))


class AgreementObserver:
    """Writes the agreement of a dataset of rankings into its manifest while the dataset is written.

    It is under `agreement`: what `agreement_of` gives, or null. Other kinds of records get no such entry.

    Args:
        gathered: Takes the records.
        otherwise: What is known of the annotators from elsewhere, for records that show no agreement themselves.
    """

    def __init__(self, gathered: Accumulator, otherwise: dict[str, Any] | None = None) -> None:
        self._gathered, self._otherwise = gathered, otherwise
        self.add = gathered.add

    def facts(self) -> dict[str, Any]:
        """The manifest's entry."""
        if "ranks" not in self._gathered.columns:
            return {}
        return {"agreement": agreement_of(self._gathered) or self._otherwise}
