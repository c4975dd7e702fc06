"""Agreement of several annotators: corrected for chance, over whole rankings, and the ceiling that it sets for the
accuracy of a reward model on single choices."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.columns import Columns
from data_tools.statistics.intervals import Estimate, clustered_fraction
from data_tools.statistics.judgements import AnnotatorVotes, mixed, pairs_of, votes_of

# ---- Krippendorff's alpha -------------------------------------------------------------------------------------------


def coincidence_sums(votes: AnnotatorVotes) -> np.ndarray:
    """(prompts, 9): each prompt's part in the 3 x 3 coincidence matrix of `alpha_of_coincidences`.

    The units are pairs of answers, the values first better < tie < second better. A pair with n votes, n_c of them c,
    adds n_c (n_k - [c = k]) / (n - 1) to cell (c, k), and the mirror image, since which answer is the first must not
    matter. Ranks are not used as values: with rankings of different K (rank 5 exists in some only) alpha of random
    clicks would be above 0.
    """
    counts = votes.counts().astype(float)
    cells = counts[:, :, None] * (counts[:, None, :] - np.eye(3)) / (counts.sum(axis=1) - 1)[:, None, None]
    return votes.per_prompt((cells + cells[:, ::-1, ::-1]).reshape(-1, 9))


def alpha_of_coincidences(sums: np.ndarray) -> np.ndarray:
    """Krippendorff's ordinal alpha (Krippendorff 2004, 11.3): 1 = full agreement, 0 = chance.

    alpha = 1 - (n - 1) Σ o_ck δ²_ck / Σ n_c n_k δ²_ck with δ_ck = Σ_{g=c..k} n_g - (n_c + n_k) / 2.

    Args:
        sums: (any, 9) coincidence matrices, flattened.

    Returns:
        (any,), NaN if only one value occurs.
    """
    cells = sums.reshape(-1, 3, 3)
    each = cells.sum(axis=2)
    before = np.cumsum(each, axis=1) - each / 2  # δ_ck is the distance of the values' mid-ranks
    distance = np.square(before[:, :, None] - before[:, None, :])
    expected = (each[:, :, None] * each[:, None, :] * distance).sum(axis=(1, 2))
    observed = (cells * distance).sum(axis=(1, 2)) * (each.sum(axis=1) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


# ---- whole rankings -------------------------------------------------------------------------------------------------


def kendall_sums(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's tau-b and W of rankings of the same K >= 3 answers to a prompt by two or more named annotators.

    With two answers, both say the same as the pairwise agreement. An annotator's first ranking of the same answers
    counts.

    Returns:
        Two arrays (blocks, 2), for tau-b and for W: the value and 1; blocks without a value are left out. A block is a
        prompt with a set of answers; its tau-b is the mean over its pairs of annotators.
    """
    tau, w = [np.zeros((0, 2))], [np.zeros((0, 2))]
    for size in np.unique(columns.sizes):
        rows = np.flatnonzero((columns.sizes == size) & columns.by_named_annotator)
        if size < 3 or len(rows) < 2:
            continue
        block, ranks = _blocks(columns, rows, int(size))
        for kept, values in ((tau, tau_b_of_blocks(ranks, block)), (w, w_of_blocks(ranks, block))):
            values = values[~np.isnan(values)]
            kept.append(np.stack([values, np.ones(len(values))], axis=1))
    return np.concatenate(tau), np.concatenate(w)


def _blocks(columns: Columns, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) ascending block indices and (R, K) ranks in one order of the answers, of rows in blocks of two or more."""
    at = columns.start[rows][:, None] + np.arange(size)
    answers = columns.answer[at]
    order = np.argsort(answers, axis=1)
    ranks = np.take_along_axis(columns.rank[at], order, axis=1)
    name = mixed(columns.prompt[rows]) ^ mixed(answers).sum(axis=1, dtype=np.uint64)
    place = np.lexsort((rows, columns.annotator[rows], name))
    name, annotator, ranks = name[place], columns.annotator[rows][place], ranks[place]
    first = np.ones(len(name), bool)
    first[1:] = (name[1:] != name[:-1]) | (annotator[1:] != annotator[:-1])
    _, block, times = np.unique(name[first], return_inverse=True, return_counts=True)
    several = times[block] > 1
    return np.unique(block[several], return_inverse=True)[1], ranks[first][several]


def tau_b_of_blocks(ranks: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Mean Kendall's tau-b over the pairs of annotators of each block (Kendall 1945).

    tau-b = Σ s_a s_b / sqrt(Σ s_a² · Σ s_b²), s the signs of the rank differences over all pairs of answers; so with
    u = s / |s| the sum over the pairs of m annotators is (|Σ u|² - m) / 2. Annotators who tie everything are left out.
    (One array operation for all blocks; scipy.stats.kendalltau takes 0.2 ms a pair of annotators.)

    Args:
        ranks: (R, K), a row for each annotator.
        block: (R,) ascending from 0.

    Returns:
        (blocks,), NaN if fewer than two annotators have an order.
    """
    one, other = np.triu_indices(ranks.shape[1], 1)
    signs = np.sign(ranks[:, one] - ranks[:, other]).astype(float)
    norm = np.sqrt(np.square(signs).sum(axis=1))
    units = np.divide(signs, norm[:, None], out=np.zeros_like(signs), where=norm[:, None] > 0)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    annotators = np.add.reduceat((norm > 0).astype(float), starts)
    total = np.square(np.add.reduceat(units, starts, axis=0)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(annotators > 1, (total - annotators) / (annotators * (annotators - 1)), np.nan)


def w_of_blocks(ranks: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Kendall's coefficient of concordance of each block, corrected for ties (Kendall and Babington Smith 1939).

    W = 12 S / (m² (K³ - K) - m Σ (t³ - t)), S the sum of squared deviations of the answers' rank sums, t the sizes of
    the ties. 1 = all rankings are equal; m annotators who click at random have 1/m on average.

    Args:
        ranks: (R, K), a row for each annotator.
        block: (R,) ascending from 0.

    Returns:
        (blocks,), NaN if all annotators tie everything.
    """
    size = ranks.shape[1]
    equal = (ranks[:, :, None] == ranks[:, None, :]).sum(axis=2)
    middle = (ranks[:, :, None] > ranks[:, None, :]).sum(axis=2) + (equal + 1) / 2
    tied = (np.square(equal) - 1).sum(axis=1)  # Σ over answers of t² - 1 = Σ over ties of t³ - t
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    annotators = np.diff(np.append(starts, len(block)))
    deviations = np.add.reduceat(middle, starts, axis=0) - (annotators * (size + 1) / 2)[:, None]
    possible = annotators**2 * (size**3 - size) - annotators * np.add.reduceat(tied, starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(possible > 0, 12 * np.square(deviations).sum(axis=1) / possible, np.nan)


# ---- pairwise agreement, and the ceiling of a reward model -----------------------------------------------------------

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
