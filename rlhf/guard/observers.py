"""Observers: reward sources that score rollouts without training the policy; a reward model's own score range, and what
the guard measures of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.core.lazy import torch
from rlhf.core.table import Pick
from rlhf.judging.texts import grams
from rlhf.reward.sources import RewardContext, RewardInputs, Source, model_terms, scores_with_disagreement
from rlhf.runs.run import is_run, read_run

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
        phrases = grams(ids, PHRASE)
        total += len(phrases)
        distinct += len(set(phrases))
    return 1 - distinct / total if total else 0.0


class Observers:
    """Scores completions by the gold reward and by `guard.watch`.

    Args:
        picks: `PPOConfig.onlookers`: `gold.reward` and `guard.watch`, as far as the config has them.
        context: What is needed to build reward sources.
    """

    def __init__(self, picks: Mapping[str, Pick], context: RewardContext) -> None:
        self.sources: dict[str, Source] = {
            name: picks[key](context)
            for name, key in (("gold", "gold.reward"), ("watch", "guard.watch"))
            if key in picks
        }

    def __call__(self, inputs: RewardInputs, gold: bool) -> dict[str, torch.Tensor]:
        """float32 [B] each: `gold`, `watch`, and `watch_disagreement` where that is an ensemble.

        Args:
            gold: Whether the gold reward scores these completions too.
        """
        found = {}
        for name, source in self.sources.items():
            if name == "gold" and not gold:
                continue
            found[name], disagreement = scores_with_disagreement(source, inputs)
            if disagreement is not None and name == "watch":
                found["watch_disagreement"] = disagreement
        return found


def score_range(reward: Pick) -> tuple[float, float] | None:
    """The range in which nearly all scores of a reward model's own candidates lie; None where it is not known.

    It is in the run.json of a reward run (`score_range`). Of an ensemble it is the mean of its members' ranges, which
    holds for the mean of their scores.
    """
    if reward.name not in ("model", "ensemble"):
        return None
    ranges: list[Any] = []
    for term in model_terms(reward):
        known = read_run(term["path"]).get("score_range") if is_run(term["path"]) else None
        if not isinstance(known, Mapping):
            return None
        ranges.append((float(known["low"]), float(known["high"])))
    low, high = (sum(bounds) / len(bounds) for bounds in zip(*ranges))
    return low, high
