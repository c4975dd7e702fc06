"""Whole rankings as the elements of a batch: which are trained on, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.shared_prompt import NO_SHARING, SharedPrompts, pad_rows
from rlhf.reward.losses import RankingBatch


def informative(ranks: Iterable[Sequence[int]]) -> list[int]:
    """Indices of the rankings that are not all ties. Ranks are dense, so each of these has rank 2."""
    return [index for index, row in enumerate(ranks) if max(row) > 1]


def comparable(rankings: Any, loss: Pick) -> Sequence[int]:
    """Indices of the rankings to learn from: all, or those with two different ranks if the loss ignores ties."""
    return range(len(rankings)) if loss.row.traits["uses_ties"] else informative(rankings["ranks"][:])


def learnable(rankings: Any, loss: Pick) -> Any:
    """The comparable rankings of a table; the others are skipped and counted.

    Raises:
        UserError: Nothing is left.
    """
    kept = comparable(rankings, loss)
    if not kept:
        raise UserError(
            f"data.train: all candidates are tied in each of the {len(rankings):,} rankings",
            f"The loss {loss.name!r} learns from candidates of different ranks.",
            "Use a loss that learns from ties (rao-kupper, davidson), or other data.",
        )
    if len(kept) == len(rankings):
        return rankings
    skipped = len(rankings) - len(kept)
    say(f"Data: {skipped:,} rankings skipped: all their candidates are tied, and {loss.name} ignores ties")
    return rankings.select(kept)


@dataclass(frozen=True)
class RewardBatch:
    """B rankings with N candidates: every candidate is encoded once, however many pairs it is in."""

    input_ids: torch.Tensor
    """int64 [R, T], prompt and candidates, padded on the right; R = N rows of one candidate each, or fewer where
    candidates share their prompt."""
    attention_mask: torch.Tensor
    """int64 [R, T], 1 where there is a token."""
    branches: torch.Tensor | None
    """int64 [R, T], which token belongs to which candidate of its row (see `rlhf.models.shared_prompt`); None if
    every row has one candidate."""
    rankings: RankingBatch
    """Ranks of the candidates, in the order of the rows."""


@dataclass(frozen=True)
class RankingCollator:
    """Makes a batch from rows of a table of rankings, on `device`."""

    chat: ChatTokenizer
    weighted: bool = True
    """Use the rankings' weights; otherwise every weight is 1."""
    sharing: SharedPrompts = NO_SHARING
    """Which candidates share a row: the model's `shared_prompts`."""
    device: Any = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> RewardBatch:
        texts = [(row["prompt"], row["candidates"]) for row in rows]
        columns = {name: [row[name] for row in rows] for name in ("ranks", "ratings", "weight")}
        return RewardBatch(*pad_rows(self.chat, self.sharing.divided(texts), self.device), self.rankings(columns))

    def rankings(self, columns: Mapping[str, Sequence[Any]]) -> RankingBatch:
        """The batch without its texts, from the columns `ranks`, `ratings` and `weight` of the rows."""
        ranks, weights = columns["ranks"], columns["weight"]
        ratings = [math.nan if rating is None else rating for row in columns["ratings"] for rating in row]
        return RankingBatch(
            ranks=torch.tensor([rank for row in ranks for rank in row], device=self.device),
            ranking=torch.tensor([index for index, row in enumerate(ranks) for _ in row], device=self.device),
            ratings=torch.tensor(ratings, device=self.device),
            weights=torch.tensor(
                weights if self.weighted else [1.0] * len(weights), dtype=torch.float32, device=self.device
            ),
        )
