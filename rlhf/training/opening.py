"""What the stages that train a language model or reward model begin with: tokenizer, limit, datasets, tuned policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from rlhf import distributed
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.selection import open_datasets
from rlhf.data.store import Dataset
from rlhf.models.load import load_hf_config, load_policy, quiet, sequence_limit
from rlhf.models.vocabulary import token_count
from rlhf.runs.parents import resolve_model_path, template_time
from rlhf.tuning.methods import say_trainable, virtual_tokens
from rlhf.tuning.virtual_tokens import check_scores


@dataclass(frozen=True)
class Opening:
    """What is known of a run before anything is written or trained."""

    path: str
    """Where the model is that training starts from."""
    chat: ChatTokenizer
    limit: int
    """The longest sequence in tokens, without virtual tokens."""
    data: list[Dataset]
    """The training datasets, then those that are held out."""


def open_stage(config: Any, resume: bool, kinds: Sequence[str], task: str = "causal") -> Opening:
    """Set up this process, and open what the config of a supervised stage names. Every rank calls it.

    Args:
        config: The stage's config.
        resume: Whether a run is resumed.
        kinds: Of the datasets.
        task: As of the rows of `TUNING`.

    Raises:
        UserError: There is no such model, or a dataset is damaged or of another kind.
    """
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    quiet()
    path = resolve_model_path(config.model.path)
    chat = load_tokenizer(config.model, path, template_time(config, resume))
    found, virtual = load_hf_config(config.model, path), virtual_tokens(config.tuning)
    if virtual:
        check_scores(config.tuning.name, found, task)
    data = open_datasets([*config.data.train, *config.data.eval], kinds, "data")
    return Opening(path, chat, sequence_limit(config.model, found) - virtual, data)


def tuned_policy(config: Any, start: Opening) -> Any:
    """The policy and its trainable weights; the same initial weights on every rank."""
    transformers.set_seed(config.seed)
    tokens, grouped = token_count(start.chat.tokenizer), distributed.grouped()
    base = load_policy(config.model, start.path, tokens=tokens, as_stored=grouped)
    model = config.tuning(base, start.chat, "causal")
    say_trainable(config.tuning, model)
    return model
