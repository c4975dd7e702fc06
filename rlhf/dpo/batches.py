"""Batches of whole rankings whose answers' log-probs are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.reward.collator import RankingCollator, RewardBatch


@dataclass(frozen=True)
class PreferenceBatch(RewardBatch):
    """B rankings with N answers: every answer is encoded once, however many pairs it is in."""

    tokens: list[int]
    """Of each answer: those whose log-probs are computed."""
    reference: Tensor | None
    """float32 [N], log-probs of the answers under the reference, nats; None before they are known."""


def preference_batch(rows: Sequence[dict[str, Any]], collator: RankingCollator) -> PreferenceBatch:
    """A batch of rows of a table of rankings, some columns of which may be the reference's log-probs (`reference`)."""
    found, reference = collator(rows), None
    if "reference" in rows[0]:
        values = [value for row in rows for value in row["reference"]]
        reference = torch.tensor(values, dtype=torch.float32, device=found.input_ids.device)
    tokens = answer_tokens(*([row[name] for row in rows] for name in ("prompt", "candidates")))
    return PreferenceBatch(**vars(found), tokens=tokens, reference=reference)


def answer_tokens(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The tokens of each answer of rankings that have a log-prob: nothing predicts the first behind no prompt."""
    return [len(answer) - (not prompt) for prompt, several in zip(prompts, answers) for answer in several]
