"""Self-consistency: the answer that most of several samples give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.tasks.answers import Normalise, normalised


@dataclass(frozen=True)
class Vote:
    """The outcome of a vote."""

    answer: str | None
    """None if no sample holds an answer."""
    votes: int
    """Samples that gave the answer."""
    margin: float
    """Confidence: how many more samples gave the answer than the next one, as a fraction of all samples."""


def vote(answers: Sequence[str | None], normalise: Normalise = "text") -> Vote:
    """Majority vote (Wang et al. 2022). Of answers with equal votes, the one that was sampled first wins.

    Args:
        answers: The answer of each sample; None where it holds none. At least one sample.
        normalise: When two answers are the same.
    """
    counts = Counter(normalised(answer, normalise) for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0, 0.0)
    (best, votes), *others = counts.most_common(2)  # in the order of first appearance where votes are equal
    second = others[0][1] if others else 0
    answer = next(a for a in answers if a is not None and normalised(a, normalise) == best)
    return Vote(answer, votes, (votes - second) / len(answers))
