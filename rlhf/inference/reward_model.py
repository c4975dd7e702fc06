"""A trained reward model that scores whole rankings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.encode_records import EncodingCounts, encode_ranking
from rlhf.data.schema import Ranking
from rlhf.models.load import compute_dtype, load_hf_config, quiet, sequence_limit
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.reward.metrics import ScoredRanking
from rlhf.reward.scoring import score_rankings
from rlhf.runs.run import resolve_model_path

BATCH_TOKENS = 16384
"""Most tokens in one forward pass, padding included."""


@dataclass(frozen=True)
class RewardModel:
    """A reward model on this process's device."""

    scalar: ScalarModel
    chat: ChatTokenizer
    limit: int
    """Longest sequence in tokens."""

    def encode(self, rankings: Iterable[Ranking], counts: EncodingCounts) -> list[dict[str, Any] | None]:
        """A row for each ranking, None for one that does not fit; `counts` counts the reasons."""
        return [encode_ranking(ranking, self.chat, self.limit, counts) for ranking in rankings]

    def score(self, rows: Sequence[dict[str, Any]]) -> list[ScoredRanking]:
        """The raw scores of encoded rankings, in order."""
        return score_rankings(self.scalar, self.chat, rows, BATCH_TOKENS, bar=True)


def open_reward_model(path: str | Path, trust_remote_code: bool = False) -> RewardModel:
    """Load a reward model from a run, a model folder or a hub name.

    Raises:
        UserError: There is no model, or one without a trained score head.
    """
    quiet()
    config, folder = ModelConfig(path=str(path), trust_remote_code=trust_remote_code), resolve_model_path(path)
    chat, limit = load_tokenizer(config, folder), sequence_limit(config, load_hf_config(config, folder))
    scalar = load_scalar(config, folder, head="trained").to(distributed.device(), compute_dtype("auto"))
    return RewardModel(scalar, chat, limit)
