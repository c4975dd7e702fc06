"""What words alone tell: the languages of a sample, and how far a bag of words foretells who wins."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import py3langid
from sklearn import linear_model, model_selection
from sklearn.feature_extraction import text as features

from data_tools.statistics.columns import Columns
from data_tools.statistics.consistency import fraction_by_prompt
from data_tools.statistics.intervals import SEED, Estimate
from data_tools.statistics.judgements import Pairs
from data_tools.statistics.sample import Texts

MOST_PAIRS = 10_000
FEWEST_PROMPTS = 50
FOLDS = 5
REGULARISATION = 0.03  # C of scikit-learn; of 0.01 to 10 about the best on HH-RLHF, OASST1 and PandaLM
MOST_NAMED = 5_000
FEWEST_LETTERS = 80
"""Below which a text's language is not told: the identifier errs often on short texts and tables."""


def bag_of_words(columns: Columns, pairs: Pairs, texts: Texts) -> Estimate | None:
    """How often a linear model of words and word pairs names the winner among answers to prompts that it has not seen.

    Logistic regression on the difference of the two answers' log(1 + count) of hashed unigrams and bigrams, with no
    intercept, so that the order of the two does not matter; five folds that keep the pairs of a prompt together, over
    up to `MOST_PAIRS` ordered pairs of the sampled rankings. The prompt is not looked at.

    Returns:
        None with fewer than `FEWEST_PROMPTS` prompts.
    """
    chosen = np.isin(pairs.row, texts.records) & (pairs.order != 0)
    places = np.flatnonzero(chosen)
    if len(places) > MOST_PAIRS:
        places = np.sort(np.random.default_rng(SEED).choice(places, MOST_PAIRS, replace=False))
    used = Pairs(pairs.row[places], pairs.one[places], pairs.other[places], pairs.order[places])
    prompt = columns.prompt[used.row]
    if len(np.unique(prompt)) < FEWEST_PROMPTS:
        return None
    begin = columns.start[used.row]
    one = [texts.answers[row][at] for row, at in zip(used.row.tolist(), (used.one - begin).tolist())]
    other = [texts.answers[row][at] for row, at in zip(used.row.tolist(), (used.other - begin).tolist())]
    return fraction_by_prompt(prompt, foretold(one, other, used.order, prompt))


def foretold(one: list[str], other: list[str], order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Which pairs the model gets right when the pairs of their group were held out from its training.

    Args:
        one, other: Two texts a pair.
        order: (n,) 1 where `one` is better, -1 where `other` is.
        group: (n,) any integers; five or more different ones.

    Returns:
        (n,) bool.
    """
    hashed = features.HashingVectorizer(n_features=2**18, ngram_range=(1, 2), alternate_sign=False, norm=None)
    first, second = (hashed.transform(texts).log1p() for texts in (one, other))
    difference = (first - second).tocsr()
    turned = np.random.default_rng(SEED).choice([-1, 1], len(one))  # both classes, whatever stands first
    difference, winner = difference.multiply(turned[:, None]).tocsr(), order * turned
    right = np.zeros(len(one), bool)
    for seen, held_out in model_selection.GroupKFold(FOLDS).split(difference, groups=group):
        model = linear_model.LogisticRegression(
            C=REGULARISATION, fit_intercept=False, solver="liblinear", random_state=SEED
        )
        if len(np.unique(winner[seen])) > 1:
            model.fit(difference[seen], winner[seen])
            right[held_out] = model.predict(difference[held_out]) == winner[held_out]
    return right


class Languages(NamedTuple):
    """What languages the texts are in."""

    prompts: Counter[str]
    """ISO 639-1 code -> prompts."""
    other: Estimate | None
    """How often the best answer is in another language than its prompt."""
    examples: list[tuple[int, str]]
    """Such records, up to five, and the two languages in words."""


def languages(columns: Columns, texts: Texts) -> Languages:
    """Name the languages of up to `MOST_NAMED` sampled prompts, and of their best (or only) answers.

    Texts of fewer than `FEWEST_LETTERS` letters are passed over; library py3langid (Lui and Baldwin 2012).
    """
    found: Counter[str] = Counter()
    other, prompts, examples = [], [], []
    for row in texts.records[:: -(-len(texts.records) // MOST_NAMED)].tolist():
        language = _language(texts.prompt[row])
        found[language] += language != ""
        if language and texts.answers[row]:
            answered = _language(texts.answers[row][best_answer(columns, row)])
            if answered:
                other.append(answered != language)
                prompts.append(columns.prompt[row])
                if other[-1] and len(examples) < 5:
                    examples.append((row, f"{language} -> {answered}"))
    share = fraction_by_prompt(np.array(prompts, np.uint64), np.array(other, bool)) if other else None
    return Languages(+found, share, examples)


def best_answer(columns: Columns, row: int) -> int:
    """Which answer of a record is the best one, from 0."""
    return int(np.argmin(columns.rank[columns.start[row] : columns.start[row + 1]]))


def _language(text: str) -> str:
    beginning = text[:1000]
    return "" if sum(map(str.isalpha, beginning)) < FEWEST_LETTERS else py3langid.classify(beginning)[0]
