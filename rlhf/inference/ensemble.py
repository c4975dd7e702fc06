"""Reward models that score given answers together: one, or an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.data.schema import Prompt
from rlhf.inference.policy import model_kind
from rlhf.inference.reward_model import RewardModel, with_tokenizer
from rlhf.inference.scorer import read_source
from rlhf.models.load import quiet
from rlhf.reward.combining import COMBINATIONS, disagreement
from rlhf.reward.members import load_members
from rlhf.reward.sources import model_terms


@dataclass(frozen=True)
class EnsembleScorer:
    """One reward model, or several whose scores are combined. Each reads text in its own tokens."""

    paths: Sequence[str]
    members: Sequence[RewardModel]
    combine: Pick

    @property
    def limit(self) -> int:
        """The longest sequence in tokens that all members can score."""
        return min(member.limit for member in self.members)

    def score_answers(
        self, prompts: Sequence[str | Sequence[Mapping[str, str]] | Prompt], answers: Sequence[str]
    ) -> list[dict[str, Any]]:
        """`score` of each answer, of an ensemble also `disagreement` (standard deviation over the members) and
        `members` (run -> score). All are None where a member cannot score the answer; see `RewardModel.score_answers`.

        Raises:
            UserError: There are not as many prompts as answers, or one is not a prompt.
        """
        columns = [member.score_answers(prompts, answers) for member in self.members]
        return [self._row(found) for found in zip(*columns)]

    def _row(self, found: Sequence[float | None]) -> dict[str, Any]:
        if len(found) == 1:
            return {"score": found[0]}
        row: dict[str, Any] = {"score": None, "disagreement": None}
        if None not in found:
            members = torch.tensor([found], dtype=torch.float32)
            row = {"score": float(self.combine(members)), "disagreement": float(disagreement(members))}
        return row | {"members": dict(zip(self.paths, found))}


def open_ensemble(spec: str, trust_remote_code: bool = False) -> EnsembleScorer:
    """Load a reward model, or those of an ensemble.

    Args:
        spec: A run, a model folder, a hub name, or see `read_reward`.
        trust_remote_code: Run Python code that comes with a model.

    Raises:
        UserError: It is none of these, or a model cannot be loaded.
    """
    pick = read_source(spec)
    if pick.name not in ("model", "ensemble"):
        raise UserError(f"{spec}: is not a reward model", remedy="Name a run of the reward stage, or an ensemble.")
    paths = [term["path"] for term in model_terms(pick)]
    for path in paths:
        if model_kind(path, trust_remote_code) != "reward":
            raise UserError(f"{path}: is not a reward model", remedy="Name a run of the reward stage.")
    quiet()
    config = ModelConfig(path=paths[0], trust_remote_code=trust_remote_code)
    scalars = load_members(config, paths, lambda _: None)
    found = [with_tokenizer(config.model_copy(update={"path": path}), one) for path, one in zip(paths, scalars)]
    return EnsembleScorer(paths, found, COMBINATIONS.pick(pick.options.get("combine", "mean")))
