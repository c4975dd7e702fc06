"""Models whose embedding has more or fewer rows than the tokenizer has ids.

Extra rows (Qwen2.5: 152,064 rows, 151,665 tokens) are padding: nothing decodes them, so they are never sampled. With
missing rows some texts cannot be encoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError

MASKED_LOGIT = -1e9
"""Finite, so that the entropy's p log p is 0 and not NaN."""


def token_count(tokenizer: Any) -> int:
    """One more than the tokenizer's highest id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(config: ModelConfig, found: Any, path: str, tokens: int) -> None:
    """Refuse a model that lacks embedding rows for some of `tokens` ids, unless the config says to add them.

    Args:
        config: Loading options.
        found: The model's Hugging Face config.
        path: Where the model is.
        tokens: `token_count` of the tokenizer whose ids the model gets.

    Raises:
        UserError: Rows are missing.
    """
    rows = getattr(found.get_text_config(), "vocab_size", None)
    if rows is None or rows >= tokens or config.resize_embeddings:
        return
    raise UserError(
        f"{path}: the model's embedding has {rows:,} rows, but the tokenizer has ids up to {tokens - 1:,}",
        "A text with one of the higher ids cannot be encoded.",
        "Use the tokenizer that belongs to the model; or, to train new rows that start at the mean of the others, "
        "set model.resize_embeddings=true in the stage that introduces the tokens (SFT).",
    )


@torch.no_grad()
def add_rows(model: Any, tokens: int, dtype: torch.dtype) -> None:
    """Give the embedding and the head at least `tokens` rows. New ones are the mean of the others, so that every model
    loaded from the same folder gets the same ones. A table that gets rows is cast to `dtype`."""
    before = model.get_input_embeddings().weight.shape[0]
    if before >= tokens:
        return
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        layer.to(dtype)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        for values in filter(lambda p: p is not None, (layer.weight, getattr(layer, "bias", None))):
            values[before:] = values[:before].mean(0)


def mask_unknown_ids(model: Any, tokens: int) -> None:
    """Give ids from `tokens` on probability 0, in sampling and in all log-probs and entropies.

    A hook of the head masks their logits, since everything that computes logits calls the head.
    """
    head = model.get_output_embeddings()
    if head.weight.shape[0] > tokens:
        head.known_ids = tokens
        head.register_forward_hook(mask_logits)


def mask_logits(head: nn.Module, inputs: Any, logits: Tensor) -> None:
    """Give ids from `head.known_ids` on, in place, a logit [..., V] whose probability is 0."""
    # Not recorded for the backward pass, which would copy the gradient of all logits to clear it here: it is 0 already,
    # since every loss reaches a logit through its probability.
    logits.detach()[..., head.known_ids :] = max(MASKED_LOGIT, torch.finfo(logits.dtype).min)
