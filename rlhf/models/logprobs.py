"""Log-probs of chosen tokens from hidden states, without full-vocabulary logits for a whole batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.core.errors import UserError
from rlhf.models.encoder_decoder import decoder_states, divided
from rlhf.models.hidden_states import autocast_dtype, causal_lm, hidden_states, is_encoder_decoder, predicting_states
from rlhf.models.vocabulary import mask_logits

HEAD_CHUNK_ELEMENTS = 2**24
"""Most logits that are held at a time: 64 MiB in float32."""
HEAD_CHUNK_ELEMENTS_GPU = 2**27
"""The same on a GPU, 512 MiB: each chunk, whatever its size, reads the head's weights and adds to their gradient."""


def head_chunks(tokens: int, vocab_size: int) -> int:
    """The number of chunks in which the head processes `tokens` tokens; under ZeRO-3 all ranks must use the same."""
    elements = HEAD_CHUNK_ELEMENTS_GPU if torch.cuda.is_available() else HEAD_CHUNK_ELEMENTS
    return max(1, math.ceil(tokens * vocab_size / elements))


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    temperature: float,
    chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens; full logits exist for one chunk of tokens at a time.

    Args:
        model: A causal LM, or PEFT's wrapper around one.
        input_ids: int64 [B, T], prompt and response, padded on the right.
        attention_mask: [B, T], 1 where there is a token.
        response_mask: bool [B, T], True at the response tokens (never the first of a sequence).
        temperature: Logits are divided by it, as they were when sampling.
        chunks: Number of chunks of the head; `head_chunks` of the tokens when left out.

    Returns:
        float32 [n] log-probs and [n] entropies in nats, n = response_mask.sum(), row by row.
    """
    states, targets = predicting_states(model, input_ids, attention_mask, response_mask)
    return head_logprobs(causal_lm(model), states, targets, temperature, chunks)


class TokenPredictions(NamedTuple):
    """What a model predicts for chosen tokens, row by row."""

    logprobs: Tensor
    """float32 [n]."""
    entropies: Tensor
    """float32 [n], nats."""
    top1: Tensor
    """bool [n], whether the token is the most likely one."""


def token_predictions(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor,
    chunks: int | None = None, position_ids: Tensor | None = None,
) -> TokenPredictions:  # fmt: skip
    """As `token_logprobs` at temperature 1, and whether each token is the most likely one.

    Packed sequences have no attention mask, but `position_ids`; see `hidden_states`.
    """
    states, targets = predicting_states(model, input_ids, attention_mask, response_mask, position_ids)
    return TokenPredictions(*_head(causal_lm(model), states, targets, 1.0, chunks, top1=True))


def head_logprobs(
    lm: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, chunks: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [n] of `targets` [n] and entropies [n] from hidden states [n, H]; see `token_logprobs`."""
    logprobs, entropies = _head(lm, hidden, targets, temperature, chunks, top1=False)
    return logprobs, entropies


def _head(
    lm: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, chunks: int | None, top1: bool
) -> tuple[Tensor, ...]:
    chunks = chunks or head_chunks(len(targets), lm.config.get_text_config().vocab_size)
    head = lm.get_output_embeddings()
    if is_frozen_product(lm):
        found = FrozenHead.apply(hidden, head, targets, temperature, chunks, top1)
        return found if top1 else found[:2]

    def part(states: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        found = SelectiveLogSoftmax.apply(head_logits(lm, states), wanted, temperature, top1)
        return found if top1 else found[:2]

    parts = []
    for number, (states, wanted) in enumerate(zip(hidden.tensor_split(chunks), targets.tensor_split(chunks)), 1):
        # The backward pass recomputes each chunk's logits, except those of the last chunk, with which it starts.
        if torch.is_grad_enabled() and number < chunks:
            parts.append(checkpoint(part, states, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(part(states, wanted))
    return tuple(torch.cat(column) for column in zip(*parts))


class SelectiveLogSoftmax(torch.autograd.Function):
    """Log-probs of tokens, entropies and on request top-1 flags from logits [n, V], which it overwrites. Forward and
    backward hold two such matrices at a time, the logits included; three with an entropy bonus.

    With log-probs l, p = exp(l), temperature T and entropy H: d l_i / d logit_j = (1[i=j] - p_j) / T and
    d H / d logit_j = -p_j (l_j + H) / T.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, wanted: Tensor, temperature: float, top1: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if temperature != 1:
            logits /= temperature
        logprobs = torch.log_softmax(logits, -1, out=logits)
        chosen = logprobs.gather(-1, wanted[:, None]).squeeze(-1)
        entropies = -logprobs.exp().mul_(logprobs).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        ctx.save_for_backward(logprobs, wanted, entropies)
        is_top1 = chosen == logprobs.amax(-1) if top1 else None
        if is_top1 is not None:
            ctx.mark_non_differentiable(is_top1)
        return chosen, entropies, is_top1

    @staticmethod
    def backward(ctx: Any, chosen: Tensor | None, entropies: Tensor | None, _: None) -> tuple[Tensor, None, None, None]:
        logprobs, wanted, entropy = ctx.saved_tensors
        gradient = logprobs.exp()
        weight = gradient.new_zeros(len(gradient)) if chosen is None else chosen / ctx.temperature
        if entropies is None:
            gradient *= -weight[:, None]
        else:
            bonus = (logprobs + entropy[:, None]).mul_((entropies / ctx.temperature)[:, None])
            gradient *= bonus.add_(weight[:, None]).neg_()
        return gradient.scatter_add_(-1, wanted[:, None], weight[:, None]), None, None, None


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


def is_frozen_product(lm: PreTrainedModel) -> bool:
    """Whether the logits are just the hidden states times a frozen weight that is whole on this process."""
    head = lm.get_output_embeddings()
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not hasattr(head.weight, "ds_id")  # ZeRO-3 gathers weights where a layer is called
        and not head._forward_pre_hooks
        and all(hook is mask_logits for hook in head._forward_hooks.values())
        and not _is_scaled(lm)
    )


SCALED_BY = ("scale_decoder_outputs", "logits_scaling", "logit_scale", "final_logit_softcapping")
"""Config options by which families scale or cap their logits."""


def _is_scaled(lm: PreTrainedModel) -> bool:
    config = lm.config.get_text_config()
    return hasattr(lm, "final_logits_bias") or any(getattr(config, option, None) for option in SCALED_BY)


def head_logits(lm: PreTrainedModel, states: Tensor) -> Tensor:
    """float32 logits as the model's own forward computes them, scaling and soft cap of the family included."""
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    if not _is_scaled(lm):
        return head(states).float()
    if getattr(config, "scale_decoder_outputs", False):  # T5
        states = states * config.d_model**-0.5
    logits = head(states).float()
    if hasattr(lm, "final_logits_bias"):  # BART
        logits = logits + lm.final_logits_bias[0]  # type: ignore[index]
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not its head applied to its last hidden states.

    Raises:
        UserError: The two differ, so log-probs would be wrong.
    """
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    if is_encoder_decoder(model):
        parts = divided(model, ids, mask, mask.cumsum(-1) > 4)
        whole = model(
            input_ids=parts.encoder_ids, attention_mask=parts.encoder_mask, decoder_input_ids=parts.decoder_ids
        )
        expected, states = whole.logits[0].float(), decoder_states(model, parts)[0]
    else:
        expected = model(input_ids=ids, attention_mask=mask).logits[0].float()
        states = hidden_states(model, ids, mask)[0]
    found = head_logits(model, states)
    model.train(training)
    if not torch.allclose(expected, found, atol=1e-2 * float(expected.abs().max()) + 1e-4):
        raise UserError(
            f"{type(model).__name__}: its logits are not its output embedding times its last hidden states",
            "The log-probs that PPO needs would be wrong for this architecture.",
            "Use a model of another family (Llama, Qwen, Mistral, Gemma, GPT-2, OPT, ... are known to work).",
        )
