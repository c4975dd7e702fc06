"""Metrics of words: the languages of a sample, and the accuracy of a bag of words at predicting the winner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import py3langid
from sklearn import linear_model, model_selection
from sklearn.feature_extraction import text as features

from data_tools.statistics.columns import Columns
from data_tools.statistics.intervals import SEED, Estimate, fraction_by_prompt
from data_tools.statistics.judgements import AnswerPairs
from data_tools.statistics.sample import Texts, sampled
from rlhf.data.schema import Ranking

MOST_PAIRS, MOST_WORD_PAIRS = 10_000, 20_000
FEWEST_PROMPTS = 50
FOLDS = 5
FEATURES = 2**18
REGULARISATION = 0.03  # scikit-learn's C; about the best of 0.01 to 10 on HH-RLHF, OASST1 and PandaLM
MOST_NAMED = 5_000
FEWEST_LETTERS = 80
"""The language of a text with fewer letters is not identified: errors are frequent on short texts and tables."""


def bag_of_words(pairs: AnswerPairs, texts: Texts) -> Estimate | None:
    """How often a linear model of words and word pairs predicts the winner on held-out prompts.

    Logistic regression on the difference of the two answers' log(1 + count) of hashed unigrams and bigrams, without
    an intercept, so that the order of the two does not matter. Five folds keep the pairs of a prompt together; up to
    `MOST_PAIRS` ordered pairs of the sampled rankings are used. The model does not see the prompt.

    Returns:
        None with fewer than `FEWEST_PROMPTS` prompts.
    """
    chosen = np.isin(pairs.row, texts.records) & (pairs.order != 0)
    indices = np.flatnonzero(chosen)
    used = pairs.where(indices[sampled(len(indices), MOST_PAIRS)])
    if len(np.unique(used.prompt)) < FEWEST_PROMPTS:
        return None
    begin, rows = used.columns.start[used.row], used.row.tolist()
    one, other = (
        [texts.answers[row][at] for row, at in zip(rows, (side - begin).tolist())] for side in (used.one, used.other)
    )
    return used.fraction(predicted_correctly(one, other, used.order, used.prompt))


def predicted_correctly(one: list[str], other: list[str], order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Which pairs the model predicts correctly when it was trained without the pairs of their group; see `predictions`.

    Args:
        one, other: The two texts of each pair.
        order: (n,) 1 if `one` is better, -1 if `other` is.
        group: (n,) any integers; five or more different ones.
    """
    turned = turns(len(one))
    difference, winner = differences(zip(one, other)).multiply(turned[:, None]).tocsr(), order * turned
    folds = model_selection.GroupKFold(FOLDS).split(difference, groups=group)
    return predictions(difference, winner, folds)


def hashed(texts: Sequence[str]) -> Any:
    """Sparse (texts, `FEATURES`): log(1 + count) of hashed words and word pairs."""
    vectorizer = features.HashingVectorizer(n_features=FEATURES, ngram_range=(1, 2), alternate_sign=False, norm=None)
    return vectorizer.transform(texts).log1p()


def differences(pairs: Iterable[tuple[str, str]]) -> Any:
    """Sparse (pairs, `FEATURES`): `hashed` of the first text minus that of the second."""
    one, other = map(hashed, zip(*pairs))
    return (one - other).tocsr()


def turns(count: int) -> np.ndarray:
    """(count,) 1 or -1 at random: the sign of each pair, so that both classes occur."""
    return np.random.default_rng(SEED).choice([-1, 1], count)


def predictions(
    difference: Any, winner: np.ndarray, folds: Iterable[tuple[np.ndarray, np.ndarray]], used: np.ndarray | None = None
) -> np.ndarray:
    """(n,) float: 1 where a model that was trained on the pairs of the other folds predicts the winner, 0 where it does
    not; a half where there is nothing to learn from.

    Args:
        difference: Sparse (n, `FEATURES`).
        winner: (n,) 1 or -1.
        folds: Indices to train on, and to predict.
        used: (n,) bool, the pairs that may be trained on; by default all.
    """
    correct = np.full(len(winner), 0.5)
    for seen, held_out in folds:
        rows = seen if used is None else seen[used[seen]]
        if len(np.unique(winner[rows])) > 1:
            model = linear_model.LogisticRegression(
                C=REGULARISATION, fit_intercept=False, solver="liblinear", random_state=SEED
            )
            model.fit(difference[rows], winner[rows])
            correct[held_out] = model.predict(difference[held_out]) == winner[held_out]
    return correct


def ordered_texts(record: Ranking) -> list[tuple[str, str]]:
    """The better and the worse answer of each pair that a ranking orders."""
    answers = list(zip(record.ranks, record.answers))
    return [(one, other) for rank, one in answers for below, other in answers if rank < below]


class WordPairs:
    """The ordered pairs of rankings, at most `MOST_WORD_PAIRS` random ones.

    Args:
        rankings: Ties give no pair.
        seed: Chooses the pairs.
    """

    def __init__(self, rankings: Iterable[Ranking], seed: int = SEED) -> None:
        texts: list[tuple[str, str]] = []
        rows: list[tuple[int, int, str]] = []
        prompts: dict[str, int] = {}
        self.rankings: Counter[str] = Counter()
        """Annotator -> rankings."""
        for number, record in enumerate(rankings):
            self.rankings[record.annotator] += 1
            prompt = prompts.setdefault(record.prompt_id, len(prompts))
            found = ordered_texts(record)
            texts += found
            rows += [(prompt, number, record.annotator)] * len(found)
        self.prompts = len(prompts)
        """Number of prompts."""
        kept = sampled(len(rows), MOST_WORD_PAIRS, seed).tolist()
        self._texts = [texts[index] for index in kept]
        self.prompt, self.ranking, self.annotator = (
            np.array([rows[index][column] for index in kept]) for column in range(3)
        )
        """(pairs,) which prompt, which ranking, whose."""

    @cached_property
    def difference(self) -> Any:
        """Sparse (pairs, `FEATURES`): the better answer minus the worse."""
        return differences(self._texts)


class Languages(NamedTuple):
    """The languages of the texts."""

    prompts: Counter[str]
    """ISO 639-1 code -> prompts."""
    other: Estimate | None
    """Fraction of best answers in another language than their prompt."""
    examples: list[tuple[int, str]]
    """Up to five such records, with the two languages."""


def languages(texts: Texts) -> Languages:
    """Identify the languages of up to `MOST_NAMED` sampled prompts, and of their best (or only) answers.

    Texts with fewer than `FEWEST_LETTERS` letters are skipped. Library py3langid (Lui and Baldwin 2012).
    """
    found: Counter[str] = Counter()
    other, prompts, examples = [], [], []
    for row in texts.records[:: -(-len(texts.records) // MOST_NAMED)].tolist():
        language = _language(texts.prompt[row])
        found[language] += language != ""
        if language and texts.answers[row]:
            answered = _language(texts.answers[row][best_answer(texts.columns, row)])
            if answered:
                other.append(answered != language)
                prompts.append(texts.columns.prompt[row])
                if other[-1] and len(examples) < 5:
                    examples.append((row, f"{language} -> {answered}"))
    fraction = fraction_by_prompt(np.array(prompts, np.uint64), np.array(other, bool)) if other else None
    return Languages(+found, fraction, examples)


def best_answer(columns: Columns, row: int) -> int:
    """The index of a record's best answer."""
    return int(np.argmin(columns.rank[columns.start[row] : columns.start[row + 1]]))


def _language(text: str) -> str:
    beginning = text[:1000]
    return "" if sum(map(str.isalpha, beginning)) < FEWEST_LETTERS else py3langid.classify(beginning)[0]
