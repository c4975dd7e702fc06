"""Which attention implementation the layers of a model use: transformers' own, or ours for packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PACKED = "sdpa_packed"
"""Our attention implementation (`rlhf.models.forward`). It is `sdpa` unless it gets lengths instead of a mask."""
VARLEN = (
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
)
"""Attention implementations that separate packed sequences by their lengths, without a mask."""
KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
"""Name in torch.ops.aten of the kernel that `scaled_dot_product_attention` calls on a CPU."""


def switch(module: nn.Module, before: str, after: str) -> None:
    """Change the attention implementation of all transformers models in `module` from `before` to `after`."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == before:
            part.set_attn_implementation(after)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within this context, use transformers' `sdpa` instead of ours; without packing the two are the same."""
    packed = model.config._attn_implementation == PACKED
    if packed:
        switch(model, PACKED, "sdpa")
    try:
        yield
    finally:
        if packed:
            switch(model, "sdpa", PACKED)
