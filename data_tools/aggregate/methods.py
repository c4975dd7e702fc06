"""The table of methods that turn the votes of several annotators into one order per pool, with a confidence.

`better[i, j]` is a method's probability that item i is better than item j. The *confidence* of a pool is the mean over
its pairs of the probability that the pair is ordered right: better[i, j] for i above j, and 1/2 for a tie. A pool with
a single ranking keeps the order of that ranking, with the method's confidence in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import special

from data_tools.aggregate.bradley_terry import BradleyTerryFit
from data_tools.aggregate.votes import UNNAMED, Votes, WinMatrices
from rlhf.core.errors import UserError
from rlhf.core.table import Table

AGGREGATORS = Table("aggregation method")
"""Rows: `(votes, *, options) -> Aggregation`, deterministic. Trait `quality`: the method estimates the quality of each
annotator, so it needs their names (`UserError` without)."""

Spread = Annotated[float, Field(gt=0)]
TieBelow = Annotated[float, Field(ge=0.5, lt=1)]
LEAST = 1e-6
"""The lowest confidence: it becomes a ranking's weight, which must be above 0."""
RIGHT, WRONG = 3, 1
"""Pseudo-votes that Dawid-Skene adds for every annotator and truth. They keep a quality away from 0 and 1 if there is
little data, and select one of two mirrored solutions: the one in which most annotators are better than chance."""


@dataclass(frozen=True)
class Aggregation:
    """What every method returns."""

    ranks: np.ndarray
    """Int [I]: dense within a pool, 1 = best, equal = tie."""
    confidence: np.ndarray
    """Float [P] in (0, 1]."""
    quality: np.ndarray | None = None
    """Float [A]: the probability that the annotator orders a pair right if they do not tie it; 1/2 is chance. None if
    the method treats all annotators as equal."""


# ---- orders and confidence -------------------------------------------------------------------------------------------


def schulze(margins: np.ndarray) -> np.ndarray:
    """Ranks [B, K] from margins [B, K, K] (votes for row over column minus the reverse), by the Schulze method.

    Item i beats j if the strongest chain of majorities from i to j (as strong as its weakest link) is stronger than the
    one from j to i: majorities decide, a cycle is cut at its weakest link, and pairs that nobody compared follow from
    the others (Schulze 2011, Social Choice and Welfare 36, 267-303). Items are ranked by the number of items that they
    beat minus the number that beat them; equal numbers are a tie, as in a cycle of equal strengths.
    """
    strength = np.maximum(margins, 0)
    for middle in range(strength.shape[1]):
        chain = np.minimum(strength[:, :, middle, None], strength[:, None, middle, :])
        strength = np.maximum(strength, chain)
    before = strength > strength.swapaxes(1, 2)
    score = before.sum(2) - before.sum(1)
    order = np.argsort(-score, axis=1, kind="stable")
    steps = np.diff(np.take_along_axis(score, order, 1), axis=1, prepend=score.max(1, keepdims=True)) != 0
    return _put_back(1 + np.cumsum(steps, axis=1), order)


def by_score(scores: np.ndarray, better: np.ndarray, tie_below: float) -> np.ndarray:
    """Ranks [B, K] by descending score; an item shares the leader's rank if better[leader, item] is below `tie_below`.

    The leader of a rank is its item with the highest score, so a chain of small steps does not tie its two ends.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    rows = np.arange(len(scores))
    ranks, leader = np.ones(order.shape, np.int64), order[:, 0]
    for place in range(1, order.shape[1]):
        item = order[:, place]
        below = better[rows, leader, item] >= tie_below
        ranks[:, place] = ranks[:, place - 1] + below
        leader = np.where(below, item, leader)
    return _put_back(ranks, order)


def _put_back(ranks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Reorder ranks that are in the order of `order` to the order of the items."""
    found = np.empty_like(ranks)
    np.put_along_axis(found, order, ranks, 1)
    return found


Order = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Items [B, K] and cells [B, K, K] of the pools of one size -> their ranks [B, K], and `better` [B, K, K]."""


def _aggregation(votes: Votes, cells: WinMatrices, order: Order, quality: np.ndarray | None = None) -> Aggregation:
    """The aggregation of an order of each pool."""
    found, confidence = np.zeros(len(votes.pool), np.int64), np.zeros(len(cells.size))
    for items, where in cells.blocks():
        ranks, better = order(items, where)
        alone = votes.alone[items]
        found[items] = ranks = np.where(alone > 0, alone, ranks)
        above = ranks[:, :, None] < ranks[:, None, :]
        tied = np.triu(ranks[:, :, None] == ranks[:, None, :], 1)
        right = np.where(above, better, 0) + 0.5 * tied
        pairs = ranks.shape[1] * (ranks.shape[1] - 1) / 2
        confidence[votes.pool[items[:, 0]]] = np.clip(right.sum((1, 2)) / pairs, LEAST, 1)
    return Aggregation(found, confidence, quality)


def _tally(votes: Votes, cells: WinMatrices) -> np.ndarray:
    """Flat [cells]: votes for row over column; a tie is half a vote for each."""
    ahead, behind = cells.of(votes.first, votes.second), cells.of(votes.second, votes.first)
    first = (1 + votes.outcome) / 2
    return np.bincount(ahead, first, cells.count) + np.bincount(behind, 1 - first, cells.count)


def _need_names(votes: Votes, method: str) -> None:
    if set(votes.annotators) <= {UNNAMED}:
        raise UserError(
            f"--method {method}: no ranking names its annotator",
            "The method weighs annotators by their agreement, so it must know who made which ranking.",
            "Import the annotators' names or ids, or use --method majority or bradley-terry.",
        )


# ---- methods --------------------------------------------------------------------------------------------


@AGGREGATORS.row("majority", quality=False)
def majority(votes: Votes) -> Aggregation:
    """Each pair as most annotators order it; cycles and gaps by the Schulze method.

    better[i, j] is the posterior probability that most annotators would rank i above j: with w votes for and l against
    (a tie is half of each) and a uniform prior on their fraction, P(Beta(w + 1, l + 1) > 1/2).
    """
    # crowd-kit's MajorityVote labels pairs, which is one np.bincount here (0.01 s for 162,000 votes, crowd-kit 0.05 s);
    # the order of a pool and its confidence are not part of it.
    cells = WinMatrices(votes.pool)
    wins = _tally(votes, cells)

    def order(items: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ahead = wins[where]
        behind = ahead.swapaxes(1, 2)
        return schulze(ahead - behind), special.betainc(behind + 1, ahead + 1, 0.5)

    return _aggregation(votes, cells, order)


@AGGREGATORS.row("bradley-terry", quality=False)
def bradley_terry(votes: Votes, *, prior: Spread = 1.0, tie_below: TieBelow = 0.55) -> Aggregation:
    """A score for each answer such that score differences explain the votes best (Bradley & Terry 1952).

    P(i above j) = sigmoid(s_i - s_j); a tie is half a vote for each. Every prompt is fitted separately, since no vote
    connects answers to different prompts. better[i, j] is the probability that s_i > s_j under a normal approximation
    of the posterior at its maximum (Laplace).

    Args:
        prior: Standard deviation of the scores' normal prior around 0; with it, scores exist for a single vote.
        tie_below: Two answers are tied if the upper one is better with a probability below this.
    """
    return _by_fit(votes, BradleyTerryFit(votes, prior, slopes=False), tie_below)


@AGGREGATORS.row("crowd-bradley-terry", quality=True)
def crowd_bradley_terry(votes: Votes, *, prior: Spread = 1.0, tie_below: TieBelow = 0.55) -> Aggregation:
    """Bradley-Terry with a reliability per annotator, learned from all prompts (Raman & Joachims 2014).

    P(annotator a ranks i above j) = sigmoid(b_a (s_i - s_j)), with b_a fitted to scores that leave out the votes of a;
    see `data_tools.aggregate.bradley_terry`. Unnamed annotators share one b. (The gradient of crowd-kit's
    NoisyBradleyTerry is not that of its likelihood.)

    Args:
        prior: Standard deviation of the scores' normal prior around 0.
        tie_below: Two answers are tied if the upper one is better with a probability below this.
    """
    _need_names(votes, "crowd-bradley-terry")
    return _by_fit(votes, BradleyTerryFit(votes, prior, slopes=True), tie_below, with_quality=True)


def _by_fit(votes: Votes, fit: BradleyTerryFit, tie_below: float, with_quality: bool = False) -> Aggregation:
    def order(items: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        better = fit.better(items, where)
        return by_score(fit.scores[items], better, tie_below), better

    return _aggregation(votes, fit.cells, order, fit.quality() if with_quality else None)


@AGGREGATORS.row("dawid-skene", quality=True)
def dawid_skene(votes: Votes, *, tie_below: TieBelow = 0.55) -> Aggregation:
    """Dawid & Skene (1979), with crowd-kit: a matrix of errors per annotator, and every pair of answers as a task.

    The truth of a pair is which of the two is better, and better[i, j] is its posterior ("Maximum likelihood estimation
    of observer error-rates using the EM algorithm", Applied Statistics 28, 20-28). Ties are left out. The order follows
    the margins better[i, j] - better[j, i] by the Schulze method. Unnamed annotators share one matrix of errors.

    The confidence is too high with careless annotators: 0.92 on average while 0.87 of the pairs are right, in the
    simulation of the tests; that of crowd-bradley-terry is 0.88 there.

    Args:
        tie_below: A margin counts as 0 if the more likely order has a probability below this.
    """
    _need_names(votes, "dawid-skene")
    cells = WinMatrices(votes.pool)
    strict = votes.outcome != 0
    first, second = votes.first[strict], votes.second[strict]
    task = np.unique(cells.of(first, second), return_inverse=True)[1]
    truth, quality = _dawid_skene(task, votes.annotator[strict], votes.outcome[strict], len(votes.annotators))
    better = np.full(cells.count, 0.5)
    better[cells.of(first, second)], better[cells.of(second, first)] = truth[task], 1 - truth[task]

    def order(items: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ahead = better[where]
        behind = ahead.swapaxes(1, 2)
        clear = np.maximum(ahead, behind) >= tie_below
        margins = np.round(ahead - behind, 9)  # equal margins differ in their last digits, which would decide a cycle
        return schulze(np.where(clear, margins, 0)), ahead

    return _aggregation(votes, cells, order, quality)


def _dawid_skene(
    task: np.ndarray, annotator: np.ndarray, outcome: np.ndarray, annotators: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of outcome 1 for each task, and each annotator's quality.

    crowd-kit has no prior on errors, but tasks with a known truth: every annotator gets pseudo-votes on a few of them.
    Every pair is entered in both orders, so that it does not matter which answer is the first.
    """
    from crowdkit.aggregation import DawidSkene

    tasks = int(task.max(initial=-1)) + 1
    pseudo = [(truth, said) for truth in (1, -1) for said in (1, -1) for _ in range(RIGHT if said == truth else WRONG)]
    given = pd.Series([truth for truth, _ in pseudo], index=range(2 * tasks, 2 * tasks + len(pseudo)))
    everybody = np.arange(annotators)
    rows = {
        "task": np.concatenate([task, tasks + task, np.repeat(given.index, annotators)]),
        "worker": np.concatenate([annotator, annotator, np.tile(everybody, len(pseudo))]),
        "label": np.concatenate([outcome, -outcome, np.repeat([said for _, said in pseudo], annotators)]),
    }
    model = DawidSkene(n_iter=100).fit(pd.DataFrame(rows), given)
    right = model.errors_[1].xs(1, level="label").sort_index().to_numpy()
    return model.probas_[1].sort_index().to_numpy()[:tasks], right
