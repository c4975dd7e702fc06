"""Comparing candidates: whether two are too similar to rank, and how far reward models disagree on them."""

from __future__ import annotations

import difflib
import math
import re
import statistics
import unicodedata
from collections.abc import Sequence
from itertools import combinations


def normalised(text: str) -> str:
    """The text without differences in letter case, white space and compatibility forms (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def too_similar(one: str, other: str, threshold: float) -> bool:
    """Whether two answers are too similar to be worth ranking against each other.

    They are if they are equal after `normalised`, or if their similarity as sequences of words reaches the threshold.
    The similarity is 2 M / T (Ratcliff and Obershelp, `difflib`): M words in matching blocks, T words in both answers
    together. Words are runs of letters, digits and underscores; answers without any (emoji) are similar only if equal.

    Args:
        threshold: From 0 (any shared word will do) to 1 (the same words in the same order).
    """
    one, other = normalised(one), normalised(other)
    if one == other:
        return True
    words, others = re.findall(r"\w+", one), re.findall(r"\w+", other)
    if not words or not others:
        return False
    match = difflib.SequenceMatcher(None, words, others, autojunk=False)
    return match.quick_ratio() >= threshold and match.ratio() >= threshold


def disagreement(scores: Sequence[Sequence[float]]) -> float:
    """How far reward models disagree about the answers to one prompt, from 0 to 0.25.

    Each model gives each pair of answers i, j the probability sigmoid(s_i - s_j) that i is the better one (Bradley
    and Terry 1952). The disagreement is the variance of that probability over the models, averaged over the pairs;
    the committee of Christiano et al. 2017 (arXiv:1706.03741, section 2.2.4) picks by the same variance.

    Args:
        scores: [model][answer], raw scores on the scale that the model was trained on; two models or more.
    """
    pairs = list(combinations(range(len(scores[0])), 2))
    return statistics.fmean(statistics.pvariance([_sigmoid(s[i] - s[j]) for s in scores]) for i, j in pairs)


def _sigmoid(x: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
