"""Statistics of a policy's answers that need no model: diversity, repetition, refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

REFUSALS = (
    "i'm sorry", "i am sorry", "i apologize", "i cannot", "i can't", "i can not", "i won't", "i will not", "i'm unable",
    "i am unable", "i'm not able", "i am not able", "as an ai", "i'm just an ai", "it is not appropriate",
    "it's not appropriate",
)  # fmt: skip
"""An answer that begins with one of these, or contains one in its first START characters, counts as a refusal."""
START = 100
MOST_HYPOTHESES = 200
"""Answers of which self-BLEU is computed; each is compared with all the others of its set."""


def words_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words divided by all n-grams, over all texts (Li et al. 2016, arXiv:1510.03055).

    None without an n-gram. It falls with the number of texts: compare sets of the same size.
    """
    found = [gram for text in texts for gram in grams(words_of(text), n)]
    return len(set(found)) / len(found) if found else None


def repetition(text: str) -> float:
    """The fraction of a text's 4-grams of words that have occurred in it before; 0 for a text without one."""
    found = grams(words_of(text), 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def is_refusal(text: str) -> bool:
    """Whether an answer declines, by the list REFUSALS."""
    start = " ".join(text.lower().replace("\u2019", "'").split())[:START]
    return any(phrase in start for phrase in REFUSALS)


def self_bleu(groups: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 of each text against all others of its group (Zhu et al. 2018, arXiv:1802.01886), 0 to 100.

    The first MOST_HYPOTHESES texts are used. None without a group of two texts, or without the package sacrebleu.
    """
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    metric, scores = BLEU(effective_order=True), list[float]()
    for group in several:
        for index, text in enumerate(group):
            if len(scores) < MOST_HYPOTHESES:
                others = [other for place, other in enumerate(group) if place != index]
                scores.append(metric.sentence_score(text, others).score)
    return float(sum(scores) / len(scores))


def text_metrics(answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`distinct_1`, `distinct_2`, `repetition` (mean), `refusals` (fraction), and `self_bleu` of each prompt's answers,
    or of all answers if there is one to each prompt.

    Args:
        answers: [prompt][answer].
    """
    flat = [text for group in answers for text in group]
    alone = all(len(group) < 2 for group in answers)
    return {
        "distinct_1": distinct_n(flat, 1), "distinct_2": distinct_n(flat, 2),
        "self_bleu": self_bleu([flat] if alone else answers),
        "repetition": sum(map(repetition, flat)) / len(flat), "refusals": sum(map(is_refusal, flat)) / len(flat),
    }  # fmt: skip


def grams(units: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """All runs of `n` successive units, such as words or tokens."""
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
