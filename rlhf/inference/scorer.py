"""Score completions with a reward source."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.data.chat import ChatTokenizer, load_tokenizer
from rlhf.inference.policy import Policy, _on_device, model_kind
from rlhf.inference.sampling import Sampled
from rlhf.reward.sources import REWARDS, RewardContext, RewardInputs
from rlhf.runs.run import resolve_model_path

if TYPE_CHECKING:
    import peft
    import torch
    import transformers
else:
    peft, torch, transformers = lazy("peft"), lazy("torch"), lazy("transformers")


# ---- scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A reward source made ready for a policy's answers."""

    name: str
    limit: int | None
    """Longest sequence in tokens that it reads; None for a function."""
    chat: ChatTokenizer
    source: Callable[[RewardInputs], torch.Tensor]

    def __call__(self, answers: Sequence[Sampled]) -> list[float]:
        """One score for each answer, higher = better.

        Raises:
            UserError: A score is not finite.
        """
        from rlhf import distributed

        rows = [a.prompt_ids + a.answer.ids for a in answers]
        ids, mask = self.chat.pad(rows, distributed.device())
        finished = RewardInputs([a.prompt.chat for a in answers], [a.text for a in answers], ids, mask)
        scores: list[float] = self.source(finished).tolist()
        for score, answer in zip(scores, answers):
            if not math.isfinite(score):
                raise UserError(f"--reward {self.name}: gave {score} for the answer {answer.text[:80]!r}")
        return scores


def open_scorer(spec: str, policy: Policy) -> Scorer:
    """The reward source that `--reward` names: a reward run or model, or a Python function `module:function`.

    A model whose tokenizer or chat template differs from the policy's reads the text in its own tokens.

    Raises:
        UserError: It cannot be loaded, or is a policy.
    """
    config = ModelConfig(path=spec, trust_remote_code=policy.trust_remote_code)
    limit = None
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # a function is found in the working folder, however we were started
        options: dict[str, Any] = {"name": "function", "function": spec}
    else:
        if model_kind(spec, policy.trust_remote_code) != "reward":
            raise UserError(f"--reward {spec}: not a reward model", remedy="Name a run of the reward stage.")
        from rlhf.models.load import load_hf_config, sequence_limit

        folder = resolve_model_path(spec)
        limit = sequence_limit(config, load_hf_config(config, folder))
        same = load_tokenizer(config, folder).fingerprints() == policy.chat.fingerprints()
        options = {"name": "model", "path": spec, "retokenize": not same}
    try:
        source = REWARDS.pick(options)(RewardContext(config, policy.chat, _on_device))
    except ValueError as error:
        raise UserError(f"--reward: {error}") from None
    return Scorer(spec, limit, policy.chat, source)
