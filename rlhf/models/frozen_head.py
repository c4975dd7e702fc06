"""Log-probs through a head that is not trained: two products with its weight instead of three."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.mapped import autocast_dtype
from rlhf.models.vocabulary import mask_logits


class FrozenHead(torch.autograd.Function):
    """Log-probs of tokens, entropies and on request top-1 flags from hidden states [n, H] and a head that is frozen.

    It takes two products with the head, not three: the gradient of the log-probs is computed in the forward pass, so
    the logits are not recomputed. Three matrices [rows, V] exist at a time, and each chunk overwrites those of the one
    before.

    With weights W, d l_i / d h = (W_i - sum_j p_j W_j) / T. The entropy's gradient, needed only for an entropy bonus,
    is computed in the backward pass from recomputed logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, wanted: Tensor, temperature: float, chunks: int, top1: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = _as_computed(head.weight)
        columns: list[list[Tensor]] = [[], [], [], []]
        for (logprobs, probs), targets in zip(
            _chunk_logprobs(hidden, head, weight, temperature, chunks), wanted.tensor_split(chunks)
        ):
            chosen = logprobs.gather(-1, targets[:, None])
            is_top1 = chosen.squeeze(-1) == logprobs.amax(-1)
            entropies = -logprobs.mul_(probs).sum(-1)
            for column, found in zip(columns, (chosen.squeeze(-1), entropies, is_top1)):
                column.append(found)
            if ctx.needs_input_grad[0]:
                slope = probs.neg_().scatter_add_(-1, targets[:, None], torch.ones_like(chosen))
                columns[3].append(slope.to(weight.dtype) @ weight)
        chosen, entropies, is_top1 = (torch.cat(column) for column in columns[:3])
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            ctx.head, ctx.temperature, ctx.chunks = head, temperature, chunks
            ctx.save_for_backward(hidden, torch.cat(columns[3]), entropies)
        if not top1:
            return chosen, entropies, None
        ctx.mark_non_differentiable(is_top1)
        return chosen, entropies, is_top1

    @staticmethod
    def backward(ctx: Any, chosen: Tensor | None, entropies: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, slopes, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(hidden) if chosen is None else slopes * (chosen / ctx.temperature)[:, None]
        if entropies is not None:
            weight, parts = _as_computed(ctx.head.weight).to(slopes.dtype), []
            factors = (entropies / ctx.temperature)[:, None].tensor_split(ctx.chunks)
            matrices = _chunk_logprobs(hidden, ctx.head, weight, ctx.temperature, ctx.chunks)
            for (logprobs, probs), own, factor in zip(matrices, entropy[:, None].tensor_split(ctx.chunks), factors):
                parts.append(logprobs.add_(own).mul_(probs).mul_(-factor).to(weight.dtype) @ weight)
            gradient = gradient + torch.cat(parts)
        return gradient.to(hidden.dtype), None, None, None, None, None


def _chunk_logprobs(
    hidden: Tensor, head: nn.Linear, weight: Tensor, temperature: float, chunks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """float32 log-probs and probabilities [rows, V] of each chunk of hidden states; the next chunk overwrites them."""
    rows = math.ceil(len(hidden) / chunks)
    logits = weight.new_empty(rows, len(weight))
    logprobs = logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
    probs = torch.empty_like(logprobs)
    for states in hidden.tensor_split(chunks):
        here = slice(len(states))
        torch.mm(states.to(weight.dtype), weight.T, out=logits[here])
        if head._forward_hooks:
            mask_logits(head, states, logits[here])
        if logprobs is not logits:
            logprobs[here].copy_(logits[here])
        if temperature != 1:
            logprobs[here].div_(temperature)
        torch.log_softmax(logprobs[here], -1, out=logprobs[here])
        yield logprobs[here], torch.exp(logprobs[here], out=probs[here])


def _as_computed(weight: Tensor) -> Tensor:
    """The weight in the dtype in which it is multiplied: autocast would cast it for each chunk."""
    return weight.to(autocast_dtype(weight.device) or weight.dtype)
