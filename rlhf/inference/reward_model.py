"""A trained reward model that scores whole rankings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.encode_records import EncodingCounts, encode_ranking, fits
from rlhf.data.schema import Prompt, Proposal, Ranking
from rlhf.data.selection import as_prompt
from rlhf.inference.policy import BATCH_TOKENS, model_kind, token_limit
from rlhf.inference.scorer import read_source
from rlhf.models.load import compute_dtype, quiet
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.reward.combining import COMBINATIONS, disagreement
from rlhf.reward.members import load_members
from rlhf.reward.metrics import ScoredRanking
from rlhf.reward.scoring import score_rankings, score_texts
from rlhf.reward.sources import model_terms
from rlhf.runs.parents import resolve_model_path


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

    def raw_scores(self, proposals: Iterable[Proposal]) -> list[tuple[float, ...]]:
        """The raw scores of each proposal's candidates; () where one does not fit, or its prompt is refused."""
        tied = [Ranking(one.messages, candidates=one.candidates, ranks=(1,) * len(one.candidates)) for one in proposals]
        counts = EncodingCounts()
        rows = enumerate(self.encode(tied, counts))
        counts.report_refused("proposals")
        whole = {i: row for i, row in rows if row and len(row["candidates"]) == len(tied[i].candidates)}
        found: list[tuple[float, ...]] = [()] * len(tied)
        for i, scored in zip(whole, self.score(list(whole.values()))):
            found[i] = scored.scores
        return found

    def score_answers(
        self, prompts: Sequence[str | Sequence[Mapping[str, str]] | Prompt], answers: Sequence[str]
    ) -> list[float | None]:
        """The normalised scores of answers, as PPO gets them; higher is better.

        As in training, a long prompt keeps its end, and an answer that leaves it too little room is not cut.

        Args:
            prompts: One for each answer: a user message, {role, content} mappings, or a `Prompt`.
            answers: Texts.

        Returns:
            One score for each answer, in order; None where the answer does not fit in `limit` tokens,
            or the chat template refuses its prompt.

        Raises:
            UserError: There are not as many prompts as answers, or one is not a prompt.
        """
        if isinstance(prompts, str) or len(prompts) != len(answers):
            raise UserError(f"{len(prompts):,} prompts for {len(answers):,} answers", remedy="Give a list of each.")
        counts = EncodingCounts()
        rows = [self._tokens(as_prompt(prompt), answer, counts) for prompt, answer in zip(prompts, answers)]
        counts.report_refused("answers")
        fit = [row for row in rows if row is not None]
        raw = iter(score_texts(self.scalar, self.chat, fit.__getitem__, list(map(len, fit)), BATCH_TOKENS, bar=True))
        return [None if row is None else (next(raw) - self.scalar.mean) / self.scalar.std for row in rows]

    def _tokens(self, prompt: Prompt, answer: str, counts: EncodingCounts) -> list[int] | None:
        try:
            start, end = self.chat.prompt(prompt.messages), self.chat.response(answer)
        except RefusedText as error:
            counts.refuse(prompt, error)
            return None
        if not fits(len(end), len(start), self.limit):
            return None
        return self.chat.truncate_prompt(start, self.limit - len(end)) + end


def open_reward_model(path: str | Path, trust_remote_code: bool = False) -> RewardModel:
    """Load a reward model from a run, a model folder or a hub name.

    Raises:
        UserError: There is no model, or one without a trained score head.
    """
    quiet()
    config = ModelConfig(path=str(path), trust_remote_code=trust_remote_code)
    return with_tokenizer(config, load_scalar(config, resolve_model_path(path), head="trained"))


def with_tokenizer(config: ModelConfig, scalar: ScalarModel) -> RewardModel:
    """The scalar model that was loaded from `config.path`, on this process's device, with its tokenizer."""
    folder = resolve_model_path(config.path)
    placed = scalar.to(distributed.device(), compute_dtype("auto"))
    return RewardModel(placed, load_tokenizer(config, folder), token_limit(config, folder))


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
