"""What the guard measures on the policy's own completions. All are pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

PHRASE = 4
"""Tokens of a phrase."""


def outside_range(scores: torch.Tensor, low: float, high: float) -> float:
    """The fraction of scores, [N], outside [low, high], from 0 to 1."""
    return float(((scores < low) | (scores > high)).float().mean())


def repetition(completions: Sequence[Sequence[int]]) -> float:
    """The fraction of phrases of 4 tokens that came before in the same completion, over all completions.

    Args:
        completions: Token ids. Those with fewer than 4 tokens have no phrase.

    Returns:
        From 0 to 1; 0 where there is no phrase.
    """
    total = distinct = 0
    for ids in completions:
        phrases = [tuple(ids[i : i + PHRASE]) for i in range(len(ids) - PHRASE + 1)]
        total += len(phrases)
        distinct += len(set(phrases))
    return 1 - distinct / total if total else 0.0
