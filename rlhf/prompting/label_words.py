"""From log-probs of label words to labels. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax, logsumexp

Floats = np.ndarray


def word_scores(totals: Floats, sizes: Sequence[int], normalise: bool) -> Floats:
    """Scores [records, words] of words: their log-probs in nats, divided by their numbers of tokens if `normalise`.

    Args:
        totals: float64 [records, words], the log-prob of each word, summed over its tokens.
        sizes: Tokens of each word.
        normalise: Whether to divide by the length, so that words of many tokens have no disadvantage.
    """
    return totals / np.array(sizes, float) if normalise else totals


def label_logprobs(scores: Floats, label_of: Sequence[int], labels: int) -> Floats:
    """Log-probs [records, labels] of labels, normalised over the labels.

    A label has the mean probability of its words, so that many words are no advantage.

    Args:
        scores: float64 [records, words].
        label_of: The label's number of each word.
        labels: Number of labels; each has a word.
    """
    groups = [[i for i, number in enumerate(label_of) if number == label] for label in range(labels)]
    means = [logsumexp(scores[:, group], axis=1) - np.log(len(group)) for group in groups]
    return log_softmax(np.stack(means, 1), axis=1)


def calibrated(logprobs: Floats, content_free: Floats) -> Floats:
    """Log-probs of labels after contextual calibration: q = softmax(W p), W = diag(p_cf)^-1 (Zhao et al. 2021, eq. 1).

    As in the authors' code, the products are normalised by their sum rather than by a softmax.

    Args:
        logprobs: float64 [records, labels], normalised.
        content_free: float64 [inputs, labels] or [records, inputs, labels], the same of inputs without content; their
            probabilities are averaged.
    """
    mean = logsumexp(content_free, axis=-2) - np.log(content_free.shape[-2])
    return log_softmax(logprobs - mean, axis=-1)
