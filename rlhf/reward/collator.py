"""Whole rankings as the elements of a batch: which are trained on, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.chat import ChatTokenizer
from rlhf.models.shared_prompt import NO_SHARING, PromptWithCompletions, SharedPrompts, pad_rows


def informative(ranks: Iterable[Sequence[int]]) -> list[int]:
    """Indices of the rankings that are not all ties. Ranks are dense, so each of these has a rank 2."""
    return [index for index, row in enumerate(ranks) if max(row) > 1]


@dataclass(frozen=True)
class RankingCollator:
    """Rows of a table of rankings to one flat batch: every candidate is encoded once, however many pairs it is in.

    The batch of B rankings, with N candidates altogether:

    - `input_ids`, `attention_mask`: int64 [R, T], prompt and candidates, padded on the right; R = N rows of one
      candidate each, or fewer where candidates share their prompt.
    - `branches`: int64 [R, T], which token belongs to which candidate of its row (see `rlhf.models.shared_prompt`);
      only where some row has several.
    - `ranks`: int64 [N], 1 = best. `ratings`: float32 [N], NaN where there is none.
    - `ranking`: int64 [N], the ranking of each candidate, 0..B-1, ascending.
    - `weights`: float32 [B], how much each ranking counts.
    """

    chat: ChatTokenizer
    weighted: bool = True
    """Take the rankings' weights; all count alike otherwise."""
    sharing: SharedPrompts = NO_SHARING
    """Which candidates share a row: the model's `shared_prompts`."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded: list[PromptWithCompletions] = []
        longest = max(len(row["prompt"]) + len(answer) for row in rows for answer in row["candidates"])
        sharing = self.sharing.for_length(longest)
        for row in rows:
            prompt, answers = row["prompt"], row["candidates"]
            parts = sharing.rows(len(prompt), [len(answer) for answer in answers])
            encoded += [(prompt, [answers[i] for i in part]) for part in parts]
        input_ids, attention_mask, branches = pad_rows(self.chat, encoded)
        columns = {name: [row[name] for row in rows] for name in ("ranks", "ratings", "weight")}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **self.rankings(columns)}
        return batch if branches is None else batch | {"branches": branches}

    def rankings(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        """The batch without its texts, from the columns `ranks`, `ratings` and `weight` of the rows."""
        ranks, weights = columns["ranks"], columns["weight"]
        return {
            "ranks": torch.tensor([rank for row in ranks for rank in row]),
            "ratings": torch.tensor([math.nan if r is None else r for row in columns["ratings"] for r in row]),
            "ranking": torch.tensor([index for index, row in enumerate(ranks) for _ in row]),
            "weights": torch.tensor(weights if self.weighted else [1.0] * len(weights), dtype=torch.float32),
        }
