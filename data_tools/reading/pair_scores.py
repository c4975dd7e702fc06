"""Scores that a row gives to its two answers: they stay with the candidates, and must agree with who won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.reading.annotation_exports import brief
from rlhf.data.schema import BadRecord

WORDS = ("score", "rating")


def score(value: Any, name: str) -> float | None:
    """A score from a number or its text; None where there is none (null, or an empty text).

    Raises:
        BadRecord: It is something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < 1e300:
        raise BadRecord(f"{name}: not a number", brief(value))
    return number


def chosen_and_rejected(row: Mapping[str, Any]) -> list[float | None]:
    """The scores of `chosen` and `rejected`: of `score_chosen`, `chosen_score`, `chosen-rating` or the like.

    Raises:
        BadRecord: One of them is no number.
    """
    return [_score_of(row, answer) for answer in ("chosen", "rejected")]


def _score_of(row: Mapping[str, Any], answer: str) -> float | None:
    parts = [(word, between) for word in WORDS for between in "_-"]
    names = [name for word, by in parts for name in (f"{word}{by}{answer}", f"{answer}{by}{word}")]
    found = [value for name in names if (value := score(row.get(name), name)) is not None]
    return found[0] if found else None


def ranks_with_scores(ranks: Sequence[int], scores: Sequence[float | None], names: Sequence[str]) -> tuple[int, ...]:
    """The ranks of two answers, checked against their scores (higher = better): equal scores are a tie.

    Args:
        ranks: (1, 2) or (2, 1) as the row says who won.
        scores: One for each answer; None where it has none.
        names: What the row calls the two answers, for the message.

    Raises:
        BadRecord: The loser's score is the higher one.
    """
    one, other = scores
    if one is None or other is None:
        return tuple(ranks)
    if one == other:
        return (1, 1)
    if (one > other) != (ranks[0] < ranks[1]):
        seen = f"{names[0]} has {one:g}, {names[1]} has {other:g}"
        raise BadRecord("the scores contradict who won", seen, "Leave the row out, or correct it.")
    return tuple(ranks)
