"""Methods that turn the votes of several annotators into one order per pool, with a confidence: one table.

What the rows share. `better[i, j]` is a method's probability that item i is better than item j. The *confidence* of a
pool is the mean over its pairs of the probability that the pair stands right in the order: better[i, j] for i above j,
and 1/2 for a tie. A pool that holds a single ranking keeps that ranking's order, with the confidence that the method
has in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from scipy import special

from data_tools.aggregate.bradley_terry import Fit
from data_tools.aggregate.votes import UNNAMED, Cells, Votes
from rlhf.core.errors import UserError
from rlhf.core.table import Table

AGGREGATORS = Table("aggregation method")
"""Rows: `(votes, *, options) -> Verdict`, deterministic. Trait `quality`: estimates how good each annotator is, and so
needs names (`UserError` without)."""

Spread = Annotated[float, Field(gt=0)]
TieBelow = Annotated[float, Field(ge=0.5, lt=1)]
LEAST = 1e-6
"""A confidence is never 0: a ranking's weight is above 0."""
RIGHT, WRONG = 3, 1
"""Votes that Dawid-Skene lends every annotator for each truth: they keep a quality from 0 and 1 where there is little
data, and say which of two mirrored solutions is meant: most people are better than chance."""


@dataclass(frozen=True)
class Verdict:
    """What every row returns."""

    ranks: NDArray[Any]
    """Int [I]: dense within a pool, 1 = best, equal = tie."""
    confidence: NDArray[Any]
    """Float [P] in (0, 1]."""
    quality: NDArray[Any] | None = None
    """Float [A]: the probability that the annotator orders a pair right that they do not tie; 1/2 is guessing. None
    where the method takes all for equal."""


# ---- orders and confidence -------------------------------------------------------------------------------------------


def schulze(margins: NDArray[Any]) -> NDArray[Any]:
    """Ranks [B, K] from margins [B, K, K] (votes for row over column minus the reverse), by the Schulze method.

    Item i comes before j where the strongest chain of majorities from i to j (as strong as its weakest link) is
    stronger than the one back: majorities decide, a cycle is cut at its weakest link, and pairs that nobody compared
    follow from those that somebody did (Schulze 2011, Social Choice and Welfare 36, 267-303). Items are ranked by how
    many they come before minus how many come before them; equal numbers are a tie, as in a cycle of equal strengths.
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


def by_score(scores: NDArray[Any], better: NDArray[Any], tie_below: float) -> NDArray[Any]:
    """Ranks [B, K] by falling score; items whose leader is better with less than `tie_below` share the leader's rank.

    The leader of a rank is its item with the highest score, so a chain of small steps does not tie its two ends.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    rows = np.arange(len(scores))
    ranks, leader = np.ones(order.shape, np.int64), order[:, 0]
    for place in range(1, order.shape[1]):
        item = order[:, place]
        apart = better[rows, leader, item] >= tie_below
        ranks[:, place] = ranks[:, place - 1] + apart
        leader = np.where(apart, item, leader)
    return _put_back(ranks, order)


def _put_back(ranks: NDArray[Any], order: NDArray[Any]) -> NDArray[Any]:
    """Ranks in the order of `order` -> in the order of the items."""
    found = np.empty_like(ranks)
    np.put_along_axis(found, order, ranks, 1)
    return found


class _Verdicts:
    """Gathers the verdict block by block."""

    def __init__(self, votes: Votes, cells: Cells) -> None:
        self.votes = votes
        self.ranks = np.zeros(len(votes.pool), np.int64)
        self.confidence = np.zeros(len(cells.size))

    def add(self, items: NDArray[Any], ranks: NDArray[Any], better: NDArray[Any]) -> None:
        """Ranks [B, K] and probabilities [B, K, K] of pools of one size."""
        alone = self.votes.alone[items]
        ranks = np.where(alone > 0, alone, ranks)
        above = ranks[:, :, None] < ranks[:, None, :]
        tied = np.triu(ranks[:, :, None] == ranks[:, None, :], 1)
        right = np.where(above, better, 0) + 0.5 * tied
        pairs = ranks.shape[1] * (ranks.shape[1] - 1) / 2
        self.ranks[items] = ranks
        self.confidence[self.votes.pool[items[:, 0]]] = np.clip(right.sum((1, 2)) / pairs, LEAST, 1)

    def verdict(self, quality: NDArray[Any] | None = None) -> Verdict:
        return Verdict(self.ranks, self.confidence, quality)


def _tally(votes: Votes, cells: Cells) -> NDArray[Any]:
    """Flat [cells]: votes for row over column; a tie is half a vote for either."""
    ahead, behind = cells.of(votes.first, votes.second), cells.of(votes.second, votes.first)
    share = (1 + votes.outcome) / 2
    return np.bincount(ahead, share, cells.count) + np.bincount(behind, 1 - share, cells.count)


def _need_names(votes: Votes, method: str) -> None:
    if set(votes.annotators) <= {UNNAMED}:
        raise UserError(
            f"--method {method}: no ranking names its annotator",
            "The method weighs people by how well they agree, so it must know who ranked what.",
            "Import the annotator's name or number, or use --method majority or bradley-terry.",
        )


# ---- all annotators alike --------------------------------------------------------------------------------------------


@AGGREGATORS.row("majority", quality=False)
def majority(votes: Votes) -> Verdict:
    """Each pair as most annotators order it; cycles and gaps by the Schulze method.

    better[i, j] is the posterior probability that most people would put i above j: with w votes for and l against (a
    tie is half of each) and a uniform prior on their share, P(Beta(w + 1, l + 1) > 1/2).
    """
    cells = Cells(votes.pool)
    wins = _tally(votes, cells)
    found = _Verdicts(votes, cells)
    for items, where in cells.blocks():
        ahead = wins[where]
        behind = ahead.swapaxes(1, 2)
        found.add(items, schulze(ahead - behind), special.betainc(behind + 1, ahead + 1, 0.5))
    return found.verdict()


@AGGREGATORS.row("bradley-terry", quality=False)
def bradley_terry(votes: Votes, *, prior: Spread = 1.0, tie_below: TieBelow = 0.55) -> Verdict:
    """A score for each answer such that score differences explain the votes best (Bradley & Terry 1952).

    P(i above j) = sigmoid(s_i - s_j); a tie is half a vote for either. Scores are fitted for each prompt by itself, as
    no vote connects answers to different prompts. better[i, j] is the probability that s_i > s_j, with the scores'
    posterior taken for normal around its maximum (Laplace's approximation).

    Args:
        prior: Standard deviation of scores, which are taken to be normal around 0: they exist with a single vote.
        tie_below: Answers are tied where the upper one is better with a probability below this.
    """
    return _by_fit(votes, Fit(votes, prior, slopes=False), tie_below)


@AGGREGATORS.row("crowd-bradley-terry", quality=True)
def crowd_bradley_terry(votes: Votes, *, prior: Spread = 1.0, tie_below: TieBelow = 0.55) -> Verdict:
    """Bradley-Terry that learns from all prompts how much each annotator's votes are worth (Raman & Joachims 2014).

    P(annotator a puts i above j) = sigmoid(b_a (s_i - s_j)), with b_a judged on scores that a has had no part in; see
    `data_tools.aggregate.bradley_terry`. Those who are not named share one b. (crowd-kit's NoisyBradleyTerry is of this
    kind, but its gradient is not that of its likelihood, and it takes a Python step per vote.)

    Args:
        prior: Standard deviation of scores, which are taken to be normal around 0.
        tie_below: Answers are tied where the upper one is better with a probability below this.
    """
    _need_names(votes, "crowd-bradley-terry")
    return _by_fit(votes, Fit(votes, prior, slopes=True), tie_below, with_quality=True)


def _by_fit(votes: Votes, fit: Fit, tie_below: float, with_quality: bool = False) -> Verdict:
    found = _Verdicts(votes, fit.cells)
    for items, where in fit.cells.blocks():
        better = fit.better(items, where)
        found.add(items, by_score(fit.scores[items], better, tie_below), better)
    return found.verdict(fit.quality() if with_quality else None)


@AGGREGATORS.row("dawid-skene", quality=True)
def dawid_skene(votes: Votes, *, tie_below: TieBelow = 0.55) -> Verdict:
    """Each annotator's errors, from every pair of all prompts as a task of its own, through crowd-kit (1979).

    A pair's truth is which of the two is better, and better[i, j] its posterior (Dawid & Skene, "Maximum likelihood
    estimation of observer error-rates using the EM algorithm", Applied Statistics 28, 20-28). Ties say nothing of the
    order and are left out. The order follows the margins better[i, j] - better[j, i] by the Schulze method. Those who
    are not named share one matrix of errors.

    Its confidence runs high where annotators are careless: 0.92 on average where 0.87 of the pairs are right, in the
    simulation of the tests; that of crowd-bradley-terry is 0.88 there.

    Args:
        tie_below: A margin is taken for none where the likelier order has a probability below this.
    """
    _need_names(votes, "dawid-skene")
    cells = Cells(votes.pool)
    strict = votes.outcome != 0
    first, second = votes.first[strict], votes.second[strict]
    task = np.unique(cells.of(first, second), return_inverse=True)[1]
    truth, quality = _dawid_skene(task, votes.annotator[strict], votes.outcome[strict], len(votes.annotators))
    better = np.full(cells.count, 0.5)
    better[cells.of(first, second)], better[cells.of(second, first)] = truth[task], 1 - truth[task]
    found = _Verdicts(votes, cells)
    for items, where in cells.blocks():
        ahead = better[where]
        behind = ahead.swapaxes(1, 2)
        clear = np.maximum(ahead, behind) >= tie_below
        margins = np.round(ahead - behind, 9)  # equal ones differ in their last digits, which would decide a cycle
        found.add(items, schulze(np.where(clear, margins, 0)), ahead)
    return found.verdict(quality)


def _dawid_skene(
    task: NDArray[Any], annotator: NDArray[Any], outcome: NDArray[Any], people: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probability of outcome 1 for each task, and each annotator's quality.

    crowd-kit knows no prior on errors, but tasks whose truth is given: on a few of these everybody is lent votes. Every
    pair is entered both ways round, so that nothing hangs on which answer is called the first.
    """
    from crowdkit.aggregation import DawidSkene

    tasks = int(task.max(initial=-1)) + 1
    lent = [(truth, said) for truth in (1, -1) for said in (1, -1) for _ in range(RIGHT if said == truth else WRONG)]
    given = pd.Series([truth for truth, _ in lent], index=range(2 * tasks, 2 * tasks + len(lent)))
    everybody = np.arange(people)
    rows = {
        "task": np.concatenate([task, tasks + task, np.repeat(given.index, people)]),
        "worker": np.concatenate([annotator, annotator, np.tile(everybody, len(lent))]),
        "label": np.concatenate([outcome, -outcome, np.repeat([said for _, said in lent], people)]),
    }
    model = DawidSkene(n_iter=100).fit(pd.DataFrame(rows), given)
    right = model.errors_[1].xs(1, level="label").sort_index().to_numpy()
    return model.probas_[1].sort_index().to_numpy()[:tasks], right
