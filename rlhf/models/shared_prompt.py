"""K answers to one prompt in one row, so that the prompt is encoded once: the same scores and gradients for less work.

    tokens     p p p p  a a a  b b  -
    branches   0 0 0 0  1 1 1  2 2  -1
    positions  0 1 2 3  4 5 6  4 5  0

A token of an answer sees the prompt and the earlier tokens of its own answer, at the positions that it would have in a
row of its own. Nothing of another answer reaches it, so a causal model computes the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.chat import ChatTokenizer
from rlhf.models.packed_attention import PACKED

PromptWithCompletions = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Token ids of a prompt (may be empty) and of answers to it."""
MASKED_ATTENTION = {"sdpa", PACKED, "eager"}
"""Attention implementations that take a mask of which token sees which."""


# ---- which answers share a row -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPrompts:
    """Which answers go into one row with their prompt."""

    max_length: int
    """Longest text (prompt and answer, in tokens) in a batch with shared rows: a shorter sliding window would be lost
    in all of its rows. 0 where the model cannot share prompts at all."""
    linear_cost: int = 0
    """Work for a token apart from attention, in that of attending to one token."""

    def for_length(self, longest: int) -> SharedPrompts:
        """What is possible in batches whose longest text has so many tokens."""
        return self if longest <= self.max_length else NO_SHARING

    def rows(self, prompt: int, answers: Sequence[int], most: int | None = None) -> list[list[int]]:
        """Numbers of the answers in each row, in order. No text may be longer than `reach`, but for `ALONE`.

        An answer joins the row before it where that is less work than a row of its own, which repeats the prompt.

        Args:
            prompt: Its tokens.
            answers: Tokens of each answer.
            most: Most tokens in a row that has several answers.
        """
        rows: list[list[int]] = []
        length = 0  # of the last row
        for number, answer in enumerate(answers):
            joined, alone = length + answer, prompt + answer
            fits = bool(rows) and self.max_length > 0 and (most is None or joined <= most)
            if fits and self._work(joined) - self._work(length) < self._work(alone):
                rows[-1].append(number)
                length = joined
            else:
                rows.append([number])
                length = alone
        return rows

    def _work(self, tokens: int) -> int:
        return tokens * (self.linear_cost + tokens)


NO_SHARING = SharedPrompts(max_length=0)
"""Every answer in a row of its own."""


def pad_rows(
    chat: ChatTokenizer, rows: Sequence[PromptWithCompletions], device: Any = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as tensors, padded on the right.

    Returns:
        int64 `input_ids` and `attention_mask` [B, L], and `branches` [B, L], 0 for a prompt, k for its k-th answer,
        -1 for padding; None where no row has several answers.
    """
    ids, mask = chat.pad([[*prompt, *(token for answer in answers for token in answer)] for prompt, answers in rows])
    if all(len(answers) == 1 for _, answers in rows):
        return ids.to(device), mask.to(device), None
    branches = torch.full_like(ids, -1)
    for row, (prompt, answers) in zip(branches, rows):
        sizes = torch.tensor([len(prompt), *map(len, answers)])
        row[: int(sizes.sum())] = torch.arange(len(sizes)).repeat_interleave(sizes)
    return ids.to(device), mask.to(device), branches.to(device)


# ---- inside the model ----------------------------------------------------------------------------------------------


def attention_mask_of(branches: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Which token sees which, [B, 1, L, L], from `branches` [B, L], as the attention implementation wants it.

    Bool (True = sees); for `eager` a number of `dtype` that is added to the attention's logits. Padding sees the
    prompt and itself, so that no row of the softmax is empty.
    """
    same = branches[:, :, None] == branches[:, None, :]
    sees = (same | (branches[:, None, :] == 0)).tril()[:, None]
    if implementation != "eager":
        return sees
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def position_ids_of(branches: Tensor) -> Tensor:
    """Position of each token in the text it belongs to, int64 [B, L]; 0 for padding."""
    place = torch.arange(branches.shape[1], device=branches.device).expand_as(branches)
    starts = torch.ones_like(branches, dtype=torch.bool)
    starts[:, 1:] = branches[:, 1:] != branches[:, :-1]
    since = place - place.where(starts, 0).cummax(1).values
    prompt = (branches == 0).sum(1, keepdim=True)
    return torch.where(branches > 0, since + prompt, since).masked_fill(branches < 0, 0)


def completion_ends(branches: Tensor) -> Tensor:
    """True at the last token of each answer, bool [B, L]."""
    following = torch.nn.functional.pad(branches[:, 1:], (0, 1), value=-1)
    return (branches > 0) & (branches != following)


# ---- which models can ----------------------------------------------------------------------------------------------


def detect_sharing(model: nn.Module, encode: Callable[..., Tensor]) -> SharedPrompts:
    """What a decoder can share, found by trying: one short row against the same texts encoded separately.

    Args:
        model: The transformers model.
        encode: (input_ids, attention_mask, position_ids) -> hidden states [B, L, H] by it, without dropout.
    """
    config: Any = model.config
    text = config.get_text_config()
    # A causal mask in a buffer is as long as a text may be, and a row may be longer.
    masks = any(buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1 for buffer in model.buffers())
    if masks or config._attn_implementation not in MASKED_ATTENTION:
        return NO_SHARING
    if not _agrees(encode, config._attn_implementation, text.vocab_size, next(model.parameters())):
        return NO_SHARING
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    reach = min((window for window in windows if window), default=sys.maxsize)
    # A layer has about 12 H^2 weights, each of which is two operations; attending to a token is 4 H.
    return SharedPrompts(reach, linear_cost=6 * text.hidden_size)


def _agrees(encode: Callable[..., Tensor], implementation: str, vocab_size: int, weights: Tensor) -> bool:
    branches = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3 + [-1] * 2], device=weights.device)
    ids = (torch.arange(branches.shape[1], device=weights.device) * 37 + 11)[None] % vocab_size
    precision = max(1e-4, 8 * torch.finfo(weights.dtype).eps)
    try:
        shared = encode(ids, attention_mask_of(branches, implementation, weights.dtype), position_ids_of(branches))[0]
        for branch in (1, 2):
            mine = ((branches == 0) | (branches == branch))[0]
            alone = encode(ids[:, mine], torch.ones_like(ids[:, mine]), None)[0]
            if not torch.allclose(shared[mine], alone, rtol=0, atol=precision * float(alone.abs().max())):
                return False
    except Exception:  # each family refuses such a mask or such positions with an error of its own
        return False
    return True
