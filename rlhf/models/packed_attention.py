"""Attention over packed sequences on a CPU, where torch has no kernel for variable lengths.

Instead of a mask [1, 1, L, L], the model gets the lengths of the sequences [1, 1, 1, N], which transformers passes to
the attention like any four-dimensional mask. torch's causal kernel is then called once per sequence, without a mask;
all other layers work on the whole row.
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
"""Our attention implementation. It is `sdpa` unless it gets lengths instead of a mask."""
VARLEN = (
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
)
"""Attention implementations that separate packed sequences by their lengths, without a mask."""
KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
"""Name in torch.ops.aten of the kernel that `scaled_dot_product_attention` calls on a CPU."""


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """Lengths int64 [N] of packed sequences, from position ids [1, L] that start at 0 in each sequence."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]]))


# ---- a custom operator, so that torch.compile sees one node and does not break the graph of a layer -----------------


@torch.library.custom_op("rlhf::attend_each", mutates_args=())
def attend_each(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention within each of the packed sequences.

    Args:
        query: [1, heads, L, D]; `key` and `value` may have fewer heads (an integer fraction).
        sizes: int64 [N], lengths that sum to L.
        scale: Factor for the dot products.
        window: Sliding window: number of tokens that a token attends to, including itself; 0 for all.

    Returns:
        [1, L, heads, D], and float32 [1, heads, L] log-sum-exps of the softmax for the backward pass.
    """
    kernel = getattr(torch.ops.aten, KERNEL)
    found = query.new_empty(query.transpose(1, 2).shape)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    for at, mask in _parts(sizes, window, query):
        inputs = (x[:, :, at] for x in (query, key, value))
        out, sums[:, :, at] = kernel(*inputs, 0.0, mask is None, attn_mask=mask, scale=scale)
        found[:, at] = out.transpose(1, 2)
    return found, sums


@torch.library.custom_op("rlhf::attend_each_backward", mutates_args=())
def _backward_of(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, found: Tensor, sums: Tensor, sizes: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = getattr(torch.ops.aten, f"{KERNEL}_backward")
    gradient, found = gradient.transpose(1, 2), found.transpose(1, 2)
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    for at, mask in _parts(sizes, window, query):
        inputs = [x[:, :, at] for x in (gradient, query, key, value, found, sums)]
        for whole, part in zip(gradients, kernel(*inputs, 0.0, mask is None, attn_mask=mask, scale=scale)):
            whole[:, :, at] = part
    return gradients[0], gradients[1], gradients[2]


@attend_each.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.transpose(1, 2).shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward_of.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sizes, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, sizes)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward_of(gradient, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None)


attend_each.register_autograd(_backward, setup_context=_keep)


def _parts(sizes: Tensor, window: int, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """The slice of each sequence, and its mask [L, L] if it is longer than the window, else None."""
    start = 0
    for size in sizes.tolist():
        mask = None
        if 0 < window < size:
            sees = torch.ones(size, size, dtype=torch.bool).tril().triu(1 - window)
            mask = torch.zeros(size, size, dtype=like.dtype).masked_fill(~sees, float("-inf"))
        yield slice(start, start + size), mask
        start += size


# ---- for transformers ----------------------------------------------------------------------------------------------


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function for transformers: [B, heads, L, D] in, [B, L, heads, D] out."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("softcap") is not None:
        raise ValueError("softcap is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # torch casts the inputs of its own attention, not of an operator
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    wide, width = query.shape[-1], value.shape[-1]
    if width < wide:  # torch's kernel wants one size; zeros add nothing (DeepSeek-V3: keys of 192, values of 128)
        value = nn.functional.pad(value, (0, wide - width))
    found = attend_each(query, key, value, attention_mask.flatten(), scale, sliding_window or 0)[0]
    return found[..., :width], None


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


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
