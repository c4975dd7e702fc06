"""How much the order of a prompt's answers would tell about which member of an ensemble is right. Pure functions."""

from __future__ import annotations

import itertools
import math

import numpy as np

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
