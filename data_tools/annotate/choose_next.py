"""Which proposals to rank next: what their rankings would tell, what they cost, how they differ. Loads no models."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, sparse

from data_tools.statistics.words import hashed
from rlhf.core.console import format_number, say, table
from rlhf.data.schema import Proposal, Ranking

# ---- information -----------------------------------------------------------------------------------------------------

MOST_EXACT = 5
"""Answers up to which all orders (120) are summed; more are estimated from `DRAWS` orders."""
DRAWS = 1024
MOST_SUBSETS = 250
"""Subsets up to which each is tried; of more, one is built answer by answer."""


def order_information(scores: np.ndarray) -> np.ndarray:
    """Mutual information of the order of the answers and the member of the ensemble that is right, in nats.

    I = H(mean over members of P) - mean over members of H(P), where P is a member's distribution over the orders:
    Plackett-Luce with its scores (Plackett 1975), which for two answers is Bradley-Terry's. This is BALD (Houlsby et
    al. 2011, arXiv:1112.5745, equation 2) with the ensemble in place of the posterior. It is 0 where the members agree,
    also where all find the order a toss-up, and at most log(members). Up to `MOST_EXACT` answers it is exact, for more
    the mean of log P(order) - log mean P(order) over `DRAWS` orders, drawn from each member in turn with a fixed seed.

    Args:
        scores: (members, ..., answers) raw scores, on the scale of Plackett-Luce.

    Returns:
        (...) nats.
    """
    answers = scores.shape[-1]
    if answers <= MOST_EXACT:
        orders = np.array(list(itertools.permutations(range(answers))))
        log_p = order_log_probs(scores[..., orders])  # (members, ..., orders)
        mean = _log_mean(log_p)
        return np.maximum(0.0, (np.exp(log_p) * (log_p - mean)).sum(-1).mean(0))
    members = len(scores)
    draw = np.random.default_rng(0).gumbel(size=(DRAWS, answers))
    found = 0.0
    for member in range(members):
        perturbed = scores[member][..., None, :] + draw[member::members]
        orders = np.argsort(-perturbed, axis=-1)  # (..., draws, answers); Yellott 1977: such orders are Plackett-Luce's
        log_p = order_log_probs(np.stack([np.take_along_axis(s[..., None, :], orders, -1) for s in scores]))
        found = found + (log_p[member] - _log_mean(log_p)).mean(-1) / members
    return np.maximum(0.0, found)


def order_log_probs(scores: np.ndarray) -> np.ndarray:
    """Log-probability under Plackett-Luce of the order in which the scores are given, best first.

    Args:
        scores: (..., answers).

    Returns:
        (...) the sum over places j of s_j - log sum over i >= j of exp(s_i).
    """
    rest = np.logaddexp.accumulate(scores[..., ::-1], axis=-1)
    return scores.sum(-1) - rest.sum(-1)


def _log_mean(log_p: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(log_p, axis=0) - math.log(len(log_p))


def best_answers(scores: np.ndarray, k: int) -> tuple[tuple[int, ...], float]:
    """The k answers whose order has the most information.

    All subsets are tried while there are at most `MOST_SUBSETS`. Of more, the best pair is extended by the answer that
    adds most, one after the other: information never falls with an answer more, but the result may not be the best.

    Args:
        scores: (members, answers).
        k: How many; all if there are no more.

    Returns:
        Their indices, ascending, and the information in nats.
    """
    answers = scores.shape[1]
    k = min(k, answers)
    if math.comb(answers, k) <= MOST_SUBSETS:
        return _best(scores, list(itertools.combinations(range(answers), k)))
    chosen, most = _best(scores, list(itertools.combinations(range(answers), 2)))
    while len(chosen) < k:
        left = [index for index in range(answers) if index not in chosen]
        chosen, most = _best(scores, [tuple(sorted((*chosen, index))) for index in left])
    return chosen, most


def _best(scores: np.ndarray, subsets: list[tuple[int, ...]]) -> tuple[tuple[int, ...], float]:
    found = order_information(scores[:, np.array(subsets)])
    best = int(np.argmax(found))
    return subsets[best], float(found[best])


CHARACTERS_PER_SECOND = 24
"""238 words a minute, the mean of silent reading in English (Brysbaert 2019), at 6 characters with the space."""
SECONDS_PER_ANSWER = 3.0
FEWEST_TIMED = 20
"""Rankings with `seconds` from which the cost is fitted to them."""
SHOWN = 20


# ---- cost ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankingTime:
    """Seconds that a ranking takes: `fixed` + `answer` for each answer + `character` for each that is read."""

    fixed: float = 0.0
    answer: float = SECONDS_PER_ANSWER
    character: float = 1 / CHARACTERS_PER_SECOND
    timed: int = 0
    """Rankings that it was fitted to; 0 if it is assumed."""

    def seconds(self, proposal: Proposal) -> float:
        """Of one ranking of all the proposal's answers."""
        return self.fixed + self.answer * len(proposal.candidates) + self.character * _characters(proposal)


def fit_cost(rankings: Iterable[Ranking]) -> RankingTime:
    """The cost by the `seconds` of rankings, by length and number of answers if fewer than `FEWEST_TIMED` have any.

    Least squares with no part below 0 (Lawson and Hanson 1974). Times above three times the median are cut to that,
    since annotators take breaks.
    """
    timed = [one for one in rankings if one.seconds]
    if len(timed) < FEWEST_TIMED:
        return RankingTime()
    seconds = np.array([one.seconds for one in timed])
    seconds = np.minimum(seconds, 3 * np.median(seconds))
    rows = np.array([[1.0, len(one.candidates), _characters(one)] for one in timed])
    size = rows.max(axis=0)  # so that the three columns have one scale
    parts = optimize.nnls(rows / size, seconds)[0] / size
    return RankingTime(*map(float, parts), timed=len(timed))


def _texts(proposal: Proposal) -> list[str]:
    return [*(message.content for message in proposal.messages), *proposal.answers]


def _characters(proposal: Proposal) -> int:
    return sum(map(len, _texts(proposal)))


# ---- choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenProposal:
    """A proposal with the answers to rank, and why."""

    proposal: Proposal
    answers: tuple[int, ...]
    """Which of the original answers these are, from 0."""
    information: float
    """Nats; see `order_information`."""
    seconds: float
    coverage: float = 1.0
    """1 - the greatest cosine similarity to what was ranked before or is chosen before it."""

    @property
    def worth(self) -> float:
        """What it is chosen by, in nats per second."""
        return self.information / self.seconds

    def why(self) -> dict[str, Any]:
        """The reasons, as they are written to `why.jsonl`."""
        facts = {name: getattr(self, name) for name in ("information", "seconds", "coverage")}
        return {"prompt_id": self.proposal.prompt_id, "id": self.proposal.id, "answers": list(self.answers), **facts}


def choices(
    proposals: Sequence[Proposal], scores: Sequence[np.ndarray], k: int | None, cost: RankingTime
) -> list[ChosenProposal]:
    """For each proposal the answers to rank; see `best_answers`. They keep the order in which they are shown.

    Args:
        proposals: The candidates.
        scores: (members, answers) of each proposal.
        k: Answers of a ranking; all if None.
        cost: What a ranking costs.
    """
    found = []
    for proposal, table_ in zip(proposals, scores):
        answers, information = best_answers(np.asarray(table_), k or len(proposal.candidates))
        shown = replace(proposal, candidates=tuple(proposal.candidates[index] for index in answers))
        found.append(ChosenProposal(shown, answers, information, max(cost.seconds(shown), 0.1)))
    return found


def choose(
    found: Sequence[ChosenProposal], count: int, ranked: Sequence[Proposal], per_second: bool
) -> list[ChosenProposal]:
    """The `count` choices with the greatest worth times coverage, one after the other.

    The coverage is computed again after each: maximal marginal relevance (Carbonell and Goldstein 1998), as a product.
    Similarity is the cosine of log(1 + count) of hashed words and word pairs of prompt and answers, times the log of
    their inverse frequency among the choices, so that words which all share count for nothing.

    Args:
        found: The choices; of equals the first is taken.
        count: How many; all if there are no more.
        ranked: What was ranked before.
        per_second: Divide the information by the seconds.
    """
    texts = hashed(["\n".join(_texts(one)) for one in (*(choice.proposal for choice in found), *ranked)])
    own = texts[: len(found)]
    shared = np.asarray((own > 0).sum(axis=0)).ravel()
    texts = texts @ sparse.diags(np.log((1 + len(found)) / (1 + shared)))
    length = np.sqrt(np.asarray(texts.multiply(texts).sum(axis=1)).ravel())
    texts = sparse.diags(1 / np.where(length > 0, length, 1)) @ texts
    own = texts[: len(found)].tocsr()
    nearest = np.zeros(len(found))
    for start in range(len(found), texts.shape[0], 1000):  # a slice at a time bounds the memory
        nearest = np.maximum(nearest, (own @ texts[start : start + 1000].T).max(axis=1).toarray().ravel())
    worth = np.array([one.worth if per_second else one.information for one in found])
    chosen: list[ChosenProposal] = []
    left = np.ones(len(found), bool)
    for _ in range(min(count, len(found))):
        coverage = np.clip(1 - nearest, 0, 1)
        best = int(np.argmax(np.where(left, worth * coverage, -1)))
        left[best] = False
        chosen.append(replace(found[best], coverage=float(coverage[best])))
        nearest = np.maximum(nearest, (own @ own[best].T).toarray().ravel())
    return chosen


def fresh(proposals: Iterable[Proposal], ranked: Iterable[Proposal]) -> tuple[list[Proposal], int]:
    """The proposals that have an answer which was not ranked for their prompt, each once; and how many others."""
    seen = {(one.prompt_id, text) for one in ranked for text in one.answers}
    found: dict[str, Proposal] = {}
    others = 0
    for one in proposals:
        known = one.id in found or all((one.prompt_id, text) in seen for text in one.answers)
        others += known
        if not known:
            found[one.id] = one
    return list(found.values()), others


# ---- what is printed ----------------------------------------------------------------------------------------------


def show(chosen: Sequence[ChosenProposal], found: Sequence[ChosenProposal], cost: RankingTime) -> None:
    """Print why the first ones were chosen, and the means of all."""
    rows = [
        [place, " ".join(one.proposal.messages[-1].content.split())[:48],
         " ".join(str(index + 1) for index in one.answers),
         format_number(one.information, 3), f"{one.seconds:.0f}", f"{one.coverage:.2f}"]
        for place, one in enumerate(chosen[:SHOWN], 1)
    ]  # fmt: skip
    columns = ["", "prompt", "answers", "information", "seconds", "coverage"]
    table(f"the first {len(rows)} of {len(chosen):,} to rank", columns, rows)
    means = [statistics.fmean(one.information for one in part) for part in (chosen, found)]
    say(f"Information: {means[0]:.3g} nats on the {len(chosen):,} chosen, {means[1]:.3g} on all {len(found):,}")
    few = f"assumed from the length: fewer than {FEWEST_TIMED} rankings have times"
    how = f"fitted to {cost.timed:,} timed rankings" if cost.timed else few
    seconds = sum(one.seconds for one in chosen)
    say(f"{f'About {seconds / 60:.0f} min' if seconds >= 60 else 'Less than a minute'} to rank them ({how})")
