"""Loading a trained policy, for the commands that sample from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.console import track
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.models.adapters import virtual_tokens_of
from rlhf.models.forward import token_logprobs
from rlhf.models.load import compute_dtype, load_hf_config, load_policy, quiet, sequence_limit
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.reward.scoring import batches_by_length
from rlhf.rollout.types import SamplingParams
from rlhf.runs.parents import refuse_specialist, resolve_model_path
from rlhf.runs.run import is_run, read_run
from rlhf.tuning.save import generation_config

BATCH_TOKENS = 16384
"""Most tokens in one forward pass, padding included."""
FEW_TOKENS = 2048
"""The same for log-probs of sequences: on a CPU larger batches take up to twice as long."""


@dataclass(frozen=True)
class Policy:
    """A language model in evaluation mode, on this process's device."""

    path: str
    """The run, model folder or hub name, as given."""
    model: Any
    chat: ChatTokenizer
    limit: int
    """Longest sequence in tokens, prompt and completion together."""
    trust_remote_code: bool = False

    @property
    def prompt_learning(self) -> bool:
        """Whether learned virtual tokens precede every prompt; only PEFT's own forward pass adds them."""
        return hasattr(self.model, "peft_config") and self.model.active_peft_config.is_prompt_learning

    def prompt_limit(self, params: SamplingParams, limit: int | None = None) -> int:
        """The longest prompt in tokens. `limit` bounds the whole sequence further.

        Raises:
            UserError: The completion leaves no room for a prompt.
        """
        longest = min(self.limit, limit or self.limit)
        if params.max_new_tokens + 1 > longest:
            raise UserError(
                f"--max-new-tokens {params.max_new_tokens} leaves no room for a prompt in {longest} tokens",
                remedy=f"Use --max-new-tokens {longest // 2} or less.",
            )
        return longest - params.max_new_tokens


def token_limit(config: ModelConfig, folder: str) -> int:
    """The longest sequence of a model in tokens, without its learned virtual tokens."""
    return sequence_limit(config, load_hf_config(config, folder)) - virtual_tokens_of(folder)


def sequence_logprobs(
    model: Any, chat: ChatTokenizer, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], temperature: float, what: str
) -> list[Tensor]:
    """Log-probs in nats of chosen tokens of sequences, float64, a vector for each sequence.

    Args:
        model: A language model in evaluation mode.
        chat: For padding.
        rows: For each sequence its token ids, and which of them are chosen.
        temperature: Logits are divided by it.
        what: Is done, for the progress bar.
    """
    found: list[Any] = [None] * len(rows)
    batches = list(batches_by_length([len(ids) for ids, _ in rows], FEW_TOKENS))
    for batch in track(batches, what, unit="batches"):
        ids, mask = chat.pad([rows[i][0] for i in batch], next(model.parameters()).device)
        chosen = [[*rows[i][1], *[False] * (ids.shape[1] - len(rows[i][1]))] for i in batch]
        with torch.no_grad():
            logprobs = token_logprobs(model, ids, mask, torch.tensor(chosen, device=ids.device), temperature)[
                0
            ].double()
        for i, part in zip(batch, logprobs.split(list(map(sum, chosen)))):
            found[i] = part
    return found


def model_kind(path: str | Path, trust_remote_code: bool = False) -> str:
    """Whether a run, model folder or hub name holds a `policy` or a `reward` model.

    Raises:
        UserError: The run is not finished, or there is no model.
    """
    folder = resolve_model_path(path)
    refuse_specialist(path)
    if is_run(path):
        return "reward" if read_run(path)["stage"] == "reward" else "policy"
    found = load_hf_config(ModelConfig(path=str(path), trust_remote_code=trust_remote_code), folder)
    names = found.architectures or []
    return "reward" if any(name.endswith("ForSequenceClassification") for name in names) else "policy"


def open_policy(path: str | Path, chat_template: str = "auto", trust_remote_code: bool = False) -> Policy:
    """Load the policy of a run, a model folder or a hub name.

    Raises:
        UserError: No finished run or model there, a reward model, or no usable chat template.
    """
    quiet()
    folder = resolve_model_path(path)
    if not (Path(folder) / "adapter_config.json").is_file() and model_kind(path, trust_remote_code) == "reward":
        raise UserError(
            f"{path}: a reward model gives scores, not answers",
            remedy=f"Name an SFT or PPO run, and this one as --reward {path}.",
        )
    config = ModelConfig(path=str(path), chat_template=chat_template, trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, folder)
    model: Any = load_policy(config, folder, compute_dtype("auto"))
    mask_unknown_ids(model, token_count(chat.tokenizer))
    limit = token_limit(config, folder)
    # Only the command's options decide how to sample, not the generation config of the model's author (top_k 50, ...).
    model.generation_config = generation_config(model, chat)
    return Policy(str(path), model.to(distributed.device()).eval(), chat, limit, trust_remote_code)
