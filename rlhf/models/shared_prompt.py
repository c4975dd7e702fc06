"""K completions of one prompt in one row: the prompt is encoded once, for the same scores and gradients with less work.

    tokens     p p p p  a a a  b b  -
    branches   0 0 0 0  1 1 1  2 2  -1
    positions  0 1 2 3  4 5 6  4 5  0

A token of a completion attends to the prompt and to earlier tokens of its own completion, at the positions that it
would have in a separate row. It never attends to another completion, so a causal model computes the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.attention import PACKED
from rlhf.models.isolation import agree, unmoved, windows
from rlhf.models.mapped import computing, dtype_of

PromptWithCompletions = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Token ids of a prompt (may be empty) and of its completions."""
MASKED_ATTENTION = {"sdpa", PACKED, "eager"}
"""Attention implementations that accept a mask [B, 1, L, L]."""


# ---- which completions share a row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPrompts:
    """Decides which completions share a row with their prompt."""

    max_length: int
    """Longest text (prompt and completion, in tokens) in a batch with shared rows: the sliding window of the model,
    because masks of shared rows have no window. 0 if the model cannot share prompts."""
    linear_cost: int = 0
    """Cost of one token outside attention. The unit is the cost of attending to one token."""

    def for_length(self, longest: int) -> SharedPrompts:
        """The sharing for a batch whose longest text has `longest` tokens."""
        return self if longest <= self.max_length else NO_SHARING

    def divided(self, texts: Sequence[PromptWithCompletions]) -> list[PromptWithCompletions]:
        """The texts of one batch, each in as many rows as cost least."""
        longest = max(len(prompt) + len(completion) for prompt, completions in texts for completion in completions)
        sharing, rows = self.for_length(longest), list[PromptWithCompletions]()
        for prompt, completions in texts:
            parts = sharing.rows(len(prompt), [len(completion) for completion in completions])
            rows += [(prompt, [completions[i] for i in part]) for part in parts]
        return rows

    def rows(self, prompt: int, completions: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
        """Indices of the completions in each row, in order.

        A completion joins the previous row if that costs less than a separate row, which repeats the prompt.

        Args:
            prompt: Number of tokens of the prompt.
            completions: Number of tokens of each completion; no text may be longer than `max_length`.
            max_tokens: Most tokens in a row with several completions.
        """
        rows: list[list[int]] = []
        length = 0  # of the last row
        for index, completion in enumerate(completions):
            joined, alone = length + completion, prompt + completion
            fits = bool(rows) and self.max_length > 0 and (max_tokens is None or joined <= max_tokens)
            if fits and self._work(joined) - self._work(length) < self._work(alone):
                rows[-1].append(index)
                length = joined
            else:
                rows.append([index])
                length = alone
        return rows

    def _work(self, tokens: int) -> int:
        return tokens * (self.linear_cost + tokens)


NO_SHARING = SharedPrompts(max_length=0)
"""Every completion in a separate row."""


def pad_rows(
    chat: ChatTokenizer, rows: Sequence[PromptWithCompletions], device: Any = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as tensors, padded on the right.

    Returns:
        int64 `input_ids` and `attention_mask` [B, L], and `branches` [B, L]: 0 for a prompt, k for its k-th completion,
        -1 for padding. `branches` is None if no row has several completions.
    """
    ids, mask = chat.pad(
        [[*prompt, *(token for completion in completions for token in completion)] for prompt, completions in rows]
    )
    if all(len(completions) == 1 for _, completions in rows):
        return ids.to(device), mask.to(device), None
    branches = torch.full_like(ids, -1)
    for row, (prompt, completions) in zip(branches, rows):
        sizes = torch.tensor([len(prompt), *map(len, completions)])
        row[: int(sizes.sum())] = torch.arange(len(sizes)).repeat_interleave(sizes)
    return ids.to(device), mask.to(device), branches.to(device)


# ---- inside the model ----------------------------------------------------------------------------------------------


def attention_mask_of(branches: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """The attention mask [B, 1, L, L] for `branches` [B, L].

    Bool, True = attends; for `eager`, values of `dtype` to add to the attention logits. Padding attends to the prompt
    and to itself, so that no row of the softmax is empty.
    """
    same = branches[:, :, None] == branches[:, None, :]
    sees = (same | (branches[:, None, :] == 0)).tril()[:, None]
    if implementation != "eager":
        return sees
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def position_ids_of(branches: Tensor) -> Tensor:
    """Position of each token in its text (prompt and completion), int64 [B, L]; 0 for padding."""
    column = torch.arange(branches.shape[1], device=branches.device).expand_as(branches)
    starts = torch.ones_like(branches, dtype=torch.bool)
    starts[:, 1:] = branches[:, 1:] != branches[:, :-1]
    since = column - column.where(starts, 0).cummax(1).values
    prompt = (branches == 0).sum(1, keepdim=True)
    return torch.where(branches > 0, since + prompt, since).masked_fill(branches < 0, 0)


def completion_ends(branches: Tensor) -> Tensor:
    """bool [B, L], True at the last token of each completion."""
    following = torch.nn.functional.pad(branches[:, 1:], (0, 1), value=-1)
    return (branches > 0) & (branches != following)


# ---- which models support it ----------------------------------------------------------------------------------------


def detect_sharing(model: nn.Module, encode: Callable[..., Tensor]) -> SharedPrompts:
    """The sharing that a decoder supports, tested by encoding one shared row and the same texts separately.

    Args:
        model: The transformers model.
        encode: (input_ids, attention_mask, position_ids) -> hidden states [B, L, H] of the model, without dropout.
    """
    config: Any = model.config
    text = config.get_text_config()
    # A model with a causal mask in a buffer cannot encode rows longer than that mask.
    masks = any(buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1 for buffer in model.buffers())
    if masks or config._attn_implementation not in MASKED_ATTENTION:
        return NO_SHARING
    window = min(windows(config), default=sys.maxsize)
    with computing(model):
        device = next(model.parameters()).device
        if not _isolated(encode, config._attn_implementation, text.vocab_size, window, device, dtype_of(model)):
            return NO_SHARING
    # A layer has about 12 H^2 weights with two operations each; attending to one token costs 4 H operations.
    return SharedPrompts(window, linear_cost=6 * text.hidden_size)


def _isolated(
    encode: Callable[..., Tensor], implementation: str, vocab_size: int, window: int, device: torch.device,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether a completion has the same hidden states as in a row of its own, whatever else is in its row."""
    half = max(1, min(16, window // 2))  # a text fits into the window, the row does not if the window is small
    branches = torch.tensor([[0] * half + [1] * half + [2] * half + [-1] * 2], device=device)
    ids = (torch.arange(branches.shape[1], device=device) * 37 + 11)[None] % vocab_size
    mask, positions = attention_mask_of(branches, implementation, dtype), position_ids_of(branches)
    try:
        shared = encode(ids, mask, positions)[0]
        for branch, other in ((1, 2), (2, 1)):
            mine = ((branches == 0) | (branches == branch))[0]
            changed = encode(torch.where(branches == other, (ids + 17) % vocab_size, ids), mask, positions)[0]
            alone = encode(ids[:, mine], torch.ones_like(ids[:, mine]), None)[0]
            if not unmoved(shared[mine], changed[mine], dtype):
                return False
            if not agree(shared[mine], alone, dtype):
                return False
    except Exception:  # model families raise different errors for masks or positions that they do not support
        return False
    return True
