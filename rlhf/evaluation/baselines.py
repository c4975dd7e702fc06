"""Rules that a reward model must beat: length, position, and the words of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.schema import Ranking
from rlhf.evaluation.estimates import clustered_mean, fraction
from rlhf.evaluation.scored import RecordPairs, ScoredRecord, pairs_of
from rlhf.reward.metrics import credit

MOST_RANKINGS = 5_000
"""Training rankings that the bag of words learns from; of more, a random choice."""
FEWEST_RANKINGS = 10
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse strengths of the L2 penalty that are tried."""
WORDS = 20_000


def baselines(
    pairs: RecordPairs, scored: Sequence[ScoredRecord], train: Sequence[Ranking], seed: int = 0
) -> list[dict[str, Any]]:
    """The accuracy of simple rules on the same pairs, and how far the model is ahead of each.

    - `longer answer`: the answer of more characters is better; equal lengths count half.
    - `shown first`: the answer that the annotator saw first is better; only if every ranking says its order.
    - `bag of words`: see `BagOfWords`; only with at least ten training rankings.

    Returns:
        For each rule its `name`, the accuracy as `fraction` gives it, and `ahead`: the model's accuracy minus the
        rule's, as `clustered_mean` gives it, paired by prompt; for the bag of words also `trained_on` (rankings).
    """
    rules: list[tuple[str, np.ndarray, dict[str, Any]]] = []
    rules.append(("longer answer", pairs.longer, {}))
    if pairs.first.all():
        rules.append(("shown first", credit(pairs.first), {}))
    train = [record for record in train if len(set(record.ranks)) > 1]
    if len(train) >= FEWEST_RANKINGS:
        words = BagOfWords(train, seed)
        scores = [
            ScoredRecord(one.record, tuple(None if s is None else w for s, w in zip(one.scores, found)))
            for one, found in zip(scored, words.score([one.record for one in scored]))
        ]
        rules.append(("bag of words", pairs_of(scores).correct, {"trained_on": words.trained_on}))
    return [
        {
            "name": name, **fraction(right, pairs.prompt), **more,
            "ahead": clustered_mean(pairs.correct - right, pairs.prompt),
        }
        for name, right, more in rules
    ]  # fmt: skip


class BagOfWords:
    """Bradley and Terry's model of the words: sigmoid(w · (x_better - x_worse)), x = log(1 + count) of each word.

    A logistic regression on the differences with an L2 penalty, whose strength is the best of `STRENGTHS` on a fifth of
    the training prompts. Words are those of at least two answers, 20,000 at most.
    """

    def __init__(self, train: Sequence[Ranking], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        if len(train) > MOST_RANKINGS:
            train = [train[i] for i in sorted(generator.choice(len(train), MOST_RANKINGS, replace=False).tolist())]
        self.trained_on = len(train)
        self._counts = CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", max_features=WORDS, min_df=2)
        features = self._features(self._counts.fit_transform, train)
        pairs = pairs_of([ScoredRecord(record, (0.0,) * len(record.candidates)) for record in train])
        differences, prompts = csr_matrix(features[pairs.better] - features[pairs.worse]), np.unique(pairs.prompt)
        held = np.isin(pairs.prompt, generator.permutation(prompts)[: max(1, len(prompts) // 5)])
        best = min(STRENGTHS, key=lambda strength: _loss(differences[held], _fit(differences[~held], strength)))
        self._weights = _fit(differences, best)

    def score(self, records: Sequence[Ranking]) -> list[list[float]]:
        """The score of each candidate of each record."""
        found = iter((self._features(self._counts.transform, records) @ self._weights).tolist())
        return [[next(found) for _ in record.candidates] for record in records]

    def _features(self, count: Any, records: Sequence[Ranking]) -> csr_matrix:
        try:
            counts = count([one.text for record in records for one in record.candidates])
        except ValueError:  # no word is in two answers
            counts = csr_matrix((sum(len(record.candidates) for record in records), 1))
        return counts.astype(np.float64).log1p()


def _fit(differences: csr_matrix, strength: float) -> np.ndarray:
    # The loss of a pair is the same in both orders; every second one is turned, since the solver wants both classes.
    sign = np.where(np.arange(differences.shape[0]) % 2, -1.0, 1.0)
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=300)
    return model.fit(differences.multiply(sign[:, None]).tocsr(), sign).coef_[0]


def _loss(differences: csr_matrix, weights: np.ndarray) -> float:
    return float(np.logaddexp(0, -(differences @ weights)).mean())
