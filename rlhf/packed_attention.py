"""Attention over packed sequences one after the other, where the implementation itself has no variable lengths.

Instead of a mask [1, 1, L, L], the model is called with the sequences' lengths [1, 1, 1, N], which transformers hands
through to the attention like any mask of four dimensions. Each sequence is then a call of torch's own kernel, causal
and without a mask; all other layers work on the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "sdpa_packed"
"""Our attention implementation: `sdpa`, but where it is given lengths in the place of a mask."""


def sizes_of(position_ids: Tensor) -> Tensor:
    """Lengths of packed sequences, int64 [N], from positions [1, L] that start at 0 in each of them."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]]))


@torch.compiler.disable
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers asks of an attention function: [B, heads, L, D] in, [B, L, heads, D] out."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sizes = attention_mask.flatten().tolist()
    found = []
    for size, q, k, v in zip(sizes, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)):
        mask = _window(size, sliding_window, query.device)
        found.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(found, 1), None


def _window(size: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which token sees which, bool [1, 1, L, L], where a sequence is longer than the window."""
    if window is None or size <= window:
        return None
    every = torch.ones(size, size, dtype=torch.bool, device=device)
    return every.tril().triu(1 - window)[None, None]


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def switch(module: nn.Module, before: str, after: str) -> None:
    """Set the attention of all transformers models within `module` that have `before` to `after`."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == before:
            part.set_attn_implementation(after)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside, a model has the implementation that transformers knows, which does the same unless it packs."""
    packed = model.config._attn_implementation == PACKED
    if packed:
        switch(model, PACKED, "sdpa")
    try:
        yield
    finally:
        if packed:
            switch(model, "sdpa", PACKED)
