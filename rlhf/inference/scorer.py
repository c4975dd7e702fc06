"""Scoring completions with the reward source that `--reward` names."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.inference.policy import Policy, model_kind
from rlhf.inference.sampling import Sampled
from rlhf.models.adapters import virtual_tokens_of
from rlhf.models.load import load_hf_config, sequence_limit
from rlhf.reward.sources import REWARDS, RewardContext, RewardInputs, own_chats
from rlhf.runs.run import resolve_model_path


@dataclass(frozen=True)
class Scorer:
    """A reward source for the completions of one policy."""

    name: str
    limit: int | None
    """Longest sequence in tokens; None for a function."""
    chat: ChatTokenizer
    source: Callable[[RewardInputs], torch.Tensor]
    own_chat: ChatTokenizer | None = None
    """The reward model's tokenizer, if it is another than the policy's."""

    def __call__(self, samples: Sequence[Sampled]) -> list[float]:
        """One score for each completion, higher = better.

        Raises:
            UserError: A score is not finite.
        """
        rows = [one.prompt_ids + one.completion.ids for one in samples]
        ids, mask = self.chat.pad(rows, distributed.device())
        inputs = RewardInputs([one.prompt.chat for one in samples], [one.text for one in samples], ids, mask)
        scores: list[float] = self.source(inputs).tolist()
        for score, one in zip(scores, samples):
            if not math.isfinite(score):
                raise UserError(f"--reward {self.name}: gave {score} for the answer {one.text[:80]!r}")
        return scores


def open_scorer(spec: str, policy: Policy) -> Scorer:
    """Open a reward run or model, or a Python function `module:function`.

    A model with another tokenizer or chat template than the policy's tokenises the text again.

    Raises:
        UserError: It cannot be loaded, or is a policy.
    """
    config = ModelConfig(path=spec, trust_remote_code=policy.trust_remote_code)
    limit = None
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # functions in the working folder can be imported
        options: dict[str, Any] = {"name": "function", "function": spec}
    else:
        if model_kind(spec, policy.trust_remote_code) != "reward":
            raise UserError(f"--reward {spec}: not a reward model", remedy="Name a run of the reward stage.")
        folder = resolve_model_path(spec)
        limit = sequence_limit(config, load_hf_config(config, folder)) - virtual_tokens_of(folder)
        same = load_tokenizer(config, folder).fingerprints() == policy.chat.fingerprints()
        options = {"name": "model", "path": spec, "retokenize": not same}
    try:
        pick = REWARDS.pick(options)
        own = own_chats(pick, config)
        source = pick(RewardContext(config, policy.chat, _on_device, own_chats=own))
    except ValueError as error:
        raise UserError(f"--reward: {error}") from None
    return Scorer(spec, limit, policy.chat, source, own.get(spec))


def _on_device(model: Any) -> Any:
    return model.to(distributed.device()).eval()
