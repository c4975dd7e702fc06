"""Batches of whole rankings whose answers' log-probs are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.reward.collator import RankingCollator
from rlhf.reward.losses import RankingBatch


@dataclass(frozen=True)
class PreferenceBatch:
    """B rankings with N answers: every answer is encoded once, however many pairs it is in."""

    input_ids: Tensor
    """int64 [R, T], prompts and answers, padded on the right; R = N, or fewer where answers share their prompt."""
    attention_mask: Tensor
    """int64 [R, T], 1 where there is a token."""
    branches: Tensor
    """int64 [R, T], 0 at a prompt, k at its k-th answer, -1 at padding (see `rlhf.models.shared_prompt`)."""
    shared: bool
    """Whether any row has several answers."""
    rankings: RankingBatch
    """Ranks of the answers, in the order of the rows."""
    tokens: list[int]
    """Of each answer: those whose log-probs are computed."""
    reference: Tensor | None
    """float32 [N], log-probs of the answers under the reference, nats; None before they are known."""


def preference_batch(rows: Sequence[dict[str, Any]], collator: RankingCollator) -> PreferenceBatch:
    """A batch of rows of a table of rankings, some columns of which may be the reference's log-probs (`reference`)."""
    found = collator(rows)
    branches = found.branches
    if branches is None:  # a row holds a prompt and one answer
        prompts = torch.tensor([len(row["prompt"]) for row in rows for _ in row["candidates"]])[:, None]
        column = torch.arange(found.input_ids.shape[1])[None]
        branches = (column >= prompts).long().to(found.input_ids.device)
        branches = branches.masked_fill(found.attention_mask == 0, -1)
    reference = None
    if "reference" in rows[0]:
        values = [value for row in rows for value in row["reference"]]
        reference = torch.tensor(values, dtype=torch.float32, device=found.input_ids.device)
    shared, tokens = (
        found.branches is not None,
        answer_tokens(*([row[name] for row in rows] for name in ("prompt", "candidates"))),
    )
    return PreferenceBatch(found.input_ids, found.attention_mask, branches, shared, found.rankings, tokens, reference)


def answer_tokens(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The tokens of each answer of rankings that have a log-prob: behind an empty prompt, the first has none."""
    return [len(answer) - (not prompt) for prompt, several in zip(prompts, answers) for answer in several]
