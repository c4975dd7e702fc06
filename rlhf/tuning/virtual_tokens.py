"""Virtual tokens: the initialisation of prompt tuning, and which models cannot have them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.lazy import torch


def first_virtual_tokens(
    words: torch.Tensor, chat: Any, tokens: int, init: str, text: str | None, labels: Sequence[str] | None
) -> torch.Tensor:
    """Initial virtual tokens [tokens, H] from the word embeddings [V, H]."""
    if init == "random":
        return words.mean(0) + words.std(0) * torch.randn(tokens, words.shape[1], dtype=words.dtype)
    encode = lambda piece: chat.tokenizer.encode(piece, add_special_tokens=False)  # noqa: E731
    if text is not None:
        ids = encode(text)
        if not ids:
            raise UserError("tuning.text: the text has no tokens")
        return words[torch.tensor(ids * (tokens // len(ids) + 1))[:tokens]]
    special = set(chat.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(chat.tokenizer)) if i not in special])
    rows = words[ordinary[torch.randperm(len(ordinary)).repeat(tokens // len(ordinary) + 1)[:tokens]]]
    for index, label in enumerate((labels or [])[:tokens]):
        rows[index] = words[torch.tensor(encode(label))].mean(0)
    return rows


def check_scores(name: str, found: Any, task: str) -> None:
    """Refuse virtual tokens where PEFT cannot add them to a model with a head, by the model's Hugging Face config.

    Args:
        name: Row of TUNING with virtual tokens.
        found: Config of the model.
        task: As for the rows of TUNING.

    Raises:
        UserError: It is an encoder-decoder, and `task` is `scalar`.
    """
    if task == "scalar" and found.is_encoder_decoder:
        raise UserError(
            f"tuning: {name} does not work for a reward model or critic from an encoder-decoder ({found.model_type})",
            "transformers' classifiers of these families take only token ids, so PEFT cannot put embeddings or keys "
            "before the text.",
            "Use lora, ia3, bottleneck, last-layers or full, or a decoder.",
        )


def check_takes_keys(model: Any) -> None:
    """Refuse an encoder that takes no keys and values from before the text, which prefix tuning learns.

    Raises:
        UserError: It is one.
    """
    if hasattr(model, "score") or model.can_generate():
        return
    takes = [inspect.signature(part.forward).parameters for part in (model, model.base_model)]
    if not any("past_key_values" in names for names in takes):
        raise UserError(
            f"tuning: prefix-tuning does not work with {type(model).__name__}",
            "Its forward pass takes no keys and values from before the text.",
            "Use prompt-tuning or p-tuning.",
        )
