"""Encoder-decoders (T5, mT5, BART): which half reads which tokens of a row.

Everywhere else a row is a prompt and its response, as for a decoder. Here the prompt goes to the encoder and the
response to the decoder, behind its start token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.core.errors import UserError


def start_id(config: Any) -> int:
    """The token that the decoder starts with.

    Raises:
        UserError: The model's config names none.
    """
    found = config.decoder_start_token_id
    if found is None:
        raise UserError(
            f"model.path: the config of this {config.model_type} model has no decoder_start_token_id",
            "It is the first token that the decoder reads.",
            "Set it in config.json: the padding token for T5, the end token for BART.",
        )
    return int(found)


@dataclass(frozen=True)
class Halves:
    """Rows of prompt and response, divided."""

    encoder_ids: Tensor
    """int64 [B, E], the prompts, padded on the right."""
    encoder_mask: Tensor
    """int64 [B, E], 1 where there is a token."""
    decoder_ids: Tensor
    """int64 [B, D], the start token and the response without its last token: what predicts `targets`."""
    targets: Tensor
    """int64 [B, D], the response."""
    wanted: Tensor
    """bool [B, D], True at the chosen tokens of the response."""


def halves(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, start: int) -> Halves:
    """Divide rows where their response begins.

    Args:
        input_ids: int64 [B, T], prompt and response, padded on the right.
        attention_mask: [B, T], 1 where there is a token.
        response_mask: bool [B, T], True at the chosen tokens: all or the first of the response, never the first of a
            row. A row without one is all prompt.
        start: The decoder's first token.
    """
    lengths = attention_mask.sum(-1)
    first = torch.where(response_mask.any(-1), response_mask.int().argmax(-1), lengths)
    places = torch.arange(int(first.max()), device=input_ids.device)
    encoder_mask = (places < first[:, None]).long()
    encoder_ids = input_ids[:, : len(places)] * encoder_mask
    places = torch.arange(max(int((lengths - first).max()), 1), device=input_ids.device)
    source = (first[:, None] + places).clamp(max=input_ids.shape[1] - 1)
    inside = places < (lengths - first)[:, None]
    targets = input_ids.gather(1, source) * inside
    decoder_ids = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)
    return Halves(encoder_ids, encoder_mask, decoder_ids, targets, response_mask.gather(1, source) & inside)


def whole_text(lm: Any, input_ids: Tensor, attention_mask: Tensor) -> Halves:
    """Rows of which both halves read all tokens, as the sequence classifiers of transformers do."""
    shifted = torch.cat([torch.full_like(input_ids[:, :1], start_id(lm.config)), input_ids[:, :-1]], 1)
    return Halves(input_ids, attention_mask, shifted, input_ids, attention_mask.bool())


def divided(lm: Any, input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor) -> Halves:
    """`halves` for a model.

    Raises:
        UserError: Rows are packed (no attention mask).
    """
    if attention_mask is None:
        raise UserError(f"{type(lm).__name__} is an encoder-decoder: its rows are padded, not packed")
    return halves(input_ids, attention_mask, response_mask, start_id(lm.config))


def decoder_states(model: nn.Module, parts: Halves) -> Tensor:
    """Last hidden states [B, D, H] of the decoder, which predict `parts.targets`. Causal, so padding needs no mask."""
    lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        return _behind_virtual_tokens(model, lm, parts)
    encoded = lm.get_encoder()(input_ids=parts.encoder_ids, attention_mask=parts.encoder_mask)
    output = lm.get_decoder()(
        input_ids=parts.decoder_ids, encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=parts.encoder_mask, use_cache=False,
    )  # fmt: skip
    states: Tensor = output.last_hidden_state
    return states


def _behind_virtual_tokens(model: Any, lm: Any, parts: Halves) -> Tensor:
    """The same from PEFT's own forward, which adds virtual tokens to the encoder's input or the decoder's cache."""
    found: list[Tensor] = []
    hook = lm.get_decoder().register_forward_hook(lambda _, inputs, output: found.append(output.last_hidden_state))
    try:
        model(input_ids=parts.encoder_ids, attention_mask=parts.encoder_mask, decoder_input_ids=parts.decoder_ids)
    finally:
        hook.remove()
    return found[0][:, -parts.decoder_ids.shape[1] :]
