"""Whole rankings as the elements of a batch: which are trained on, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.tokenization import ChatTokenizer


def informative(ranks: Iterable[Sequence[int]]) -> list[int]:
    """Indices of the rankings that are not all ties. Ranks are dense, so each of these has a rank 2."""
    return [index for index, row in enumerate(ranks) if max(row) > 1]


@dataclass(frozen=True)
class RankingCollator:
    """Rows of a table of rankings to one flat batch: every candidate is encoded once, however many pairs it is in.

    The batch of B rankings, with N candidates altogether:

    - `input_ids`, `attention_mask`: int64 [N, T], prompt and candidate, padded on the right.
    - `ranks`: int64 [N], 1 = best. `ratings`: float32 [N], NaN where there is none.
    - `ranking`: int64 [N], the ranking of each candidate, 0..B-1, ascending.
    """

    chat: ChatTokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [[*row["prompt"], *answer] for row in rows for answer in row["candidates"]]
        input_ids, attention_mask = self.chat.pad(texts)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "ratings": torch.tensor([math.nan if r is None else r for row in rows for r in row["ratings"]]),
            "ranking": torch.tensor([index for index, row in enumerate(rows) for _ in row["ranks"]]),
        }
