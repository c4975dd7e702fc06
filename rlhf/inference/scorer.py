"""Scoring completions with the reward source that `--reward` names."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.inference.policy import Policy, model_kind, token_limit
from rlhf.inference.sampling import Sampled
from rlhf.reward.sources import RewardContext, RewardInputs, model_terms, own_chats, scores_with_disagreement
from rlhf.reward.spec import read_reward, retokenizing
from rlhf.runs.parents import resolve_model_path


@dataclass(frozen=True)
class CompletionScorer:
    """A reward source for the completions of one policy."""

    name: str
    limit: int | None
    """Longest sequence in tokens; None for a function."""
    chat: ChatTokenizer
    source: Callable[[RewardInputs], torch.Tensor]
    own_chats: Sequence[ChatTokenizer] = ()
    """The tokenizers of reward models that are others than the policy's."""

    def __call__(self, samples: Sequence[Sampled]) -> list[float]:
        """One score for each completion, higher = better; see `with_disagreement`."""
        return self.with_disagreement(samples)[0]

    def with_disagreement(self, samples: Sequence[Sampled]) -> tuple[list[float], list[float] | None]:
        """The scores, and the standard deviation of each over an ensemble's members; None without an ensemble.

        Raises:
            UserError: A score is not finite.
        """
        rows = [one.prompt_ids + one.completion.ids for one in samples]
        ids, mask = self.chat.pad(rows, distributed.device())
        inputs = RewardInputs([one.prompt.chat for one in samples], [one.text for one in samples], ids, mask)
        found, spread = scores_with_disagreement(self.source, inputs)
        scores: list[float] = found.tolist()
        for score, one in zip(scores, samples):
            if not math.isfinite(score):
                raise UserError(f"--reward {self.name}: gave {score} for the answer {one.text[:80]!r}")
        return scores, None if spread is None else spread.tolist()


def open_scorer(spec: str, policy: Policy) -> CompletionScorer:
    """Open a reward source: a run or model, a Python function `module:function`, or see `read_reward`.

    A model with another tokenizer or chat template than the policy's tokenises the text again.

    Raises:
        UserError: It cannot be loaded, or is a policy.
    """
    pick = read_source(spec, "--reward: ")
    config = ModelConfig(path=policy.path, trust_remote_code=policy.trust_remote_code)
    try:
        paths = [term["path"] for term in model_terms(pick)]
        limits = [_limit(path, config) for path in paths]
        pick = retokenizing(pick, [path for path in paths if not _same_text(path, policy)])
        own, place = own_chats(pick, config), lambda one: one.to(distributed.device()).eval()
        source = pick(RewardContext(config, policy.chat, place, own_chats=own))
    except ValueError as error:
        raise UserError(f"--reward: {error}") from None
    return CompletionScorer(spec, min(limits, default=None), policy.chat, source, list(own.values()))


def read_source(spec: str, option: str = "") -> Pick:
    """A reward source of a command line; functions in the working folder can be imported. `option` begins messages.

    Raises:
        UserError: It is none, or see `read_reward`.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return read_reward(spec)
    except ValueError as error:
        raise UserError(f"{option}{error}") from None


def _limit(path: str, config: ModelConfig) -> int:
    """The longest sequence of a reward model, in tokens.

    Raises:
        UserError: It is no reward model.
    """
    if model_kind(path, config.trust_remote_code) != "reward":
        raise UserError(f"--reward {path}: not a reward model", remedy="Name a run of the reward stage.")
    return token_limit(config.model_copy(update={"path": path}), resolve_model_path(path))


def _same_text(path: str, policy: Policy) -> bool:
    config = ModelConfig(path=path, trust_remote_code=policy.trust_remote_code)
    return load_tokenizer(config, resolve_model_path(path)).fingerprints() == policy.chat.fingerprints()
