"""An ensemble of bag-of-words reward models, which learns from rankings in seconds and needs no trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import optimize, special

from data_tools.statistics.words import FEATURES, REGULARISATION, WordPairs, hashed
from rlhf.core.errors import UserError
from rlhf.data.schema import Ranking


def weights(pairs: WordPairs, times: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The weights w that minimise sum of times * log(1 + exp(-w.x)) + |w - prior|^2 / (2 C): logistic regression on the
    difference x of two answers (Bradley-Terry with a linear score), C being `REGULARISATION`.

    Args:
        times: (pairs,) how often each pair counts.
        prior: (`FEATURES`,) what the weights are drawn to; where no pair says anything, they are equal to it.

    Returns:
        (`FEATURES`,)
    """
    rows = pairs.difference[times > 0]
    columns = np.unique(rows.indices)
    x, counts = rows[:, columns], times[times > 0]
    offset = x @ prior[columns]

    def loss(change: np.ndarray) -> tuple[float, np.ndarray]:
        logit = x @ change + offset
        value = counts @ np.logaddexp(0, -logit) + change @ change / (2 * REGULARISATION)
        return float(value), change / REGULARISATION - x.T @ (counts * special.expit(-logit))

    found = prior.copy()
    found[columns] += optimize.minimize(loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B").x
    return found


def train(rankings: Iterable[Ranking], members: int, seed: int) -> np.ndarray:
    """The weights of an ensemble: bootstrap with randomised priors (Osband et al. 2018, arXiv:1806.03335).

    Each member learns from as many prompts as there are, drawn with replacement, and is drawn to random weights from
    the prior N(0, C). Without these all members would give a word that no ranking shows the weight 0, and so would
    agree about what they know least.

    Returns:
        (members, `FEATURES`); an answer's scores are ``hashed([answer]) @ weights.T``.

    Raises:
        UserError: No pair is ordered.
    """
    pairs, generator = WordPairs(rankings, seed), np.random.default_rng(seed)
    if not len(pairs.prompt):
        why = "Its rankings prefer no answer to another, so there is nothing to learn from."
        raise UserError("--ranked: no ordered pair of answers", why, "Rank a few prompts of random choice first.")
    prompts = int(pairs.prompt.max()) + 1
    found = []
    for _ in range(members):
        times = np.bincount(generator.integers(0, prompts, prompts), minlength=prompts)[pairs.prompt]
        found.append(weights(pairs, times.astype(float), generator.normal(0, REGULARISATION**0.5, FEATURES)))
    return np.stack(found)


def scores(answers: Sequence[Sequence[str]], members: np.ndarray) -> list[np.ndarray]:
    """(members, answers) raw scores of each group of answers."""
    table = hashed([text for group in answers for text in group]) @ members.T
    ends = np.cumsum([len(group) for group in answers])[:-1]
    return [part.T for part in np.split(table, ends)]
