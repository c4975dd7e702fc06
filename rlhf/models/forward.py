"""A forward pass: hidden states from a model's body, and log-probs from its head without logits for a whole batch.

Rows are padded, or sequences are packed into one row. On a CPU, where torch has no attention kernel for packed
sequences, the model gets their lengths [1, 1, 1, N] instead of a mask [1, 1, L, L]; transformers passes them to the
attention like any four-dimensional mask. torch's causal kernel is then called once per sequence, without a mask; all
other layers work on the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.core.errors import UserError
from rlhf.models.attention import KERNEL, PACKED
from rlhf.models.encoder_decoder import decoder_states, divided
from rlhf.models.frozen_head import FrozenHead
from rlhf.models.vocabulary import mask_logits

HEAD_CHUNK_ELEMENTS = 2**24
"""Most logits that are held at a time: 64 MiB in float32."""
HEAD_CHUNK_ELEMENTS_GPU = 2**27
"""The same on a GPU, 512 MiB: each chunk, whatever its size, reads the head's weights and adds to their gradient."""
SCALED_BY = ("scale_decoder_outputs", "logits_scaling", "logit_scale", "final_logit_softcapping")
"""Config options by which families scale or cap their logits."""


# ---- through the body ------------------------------------------------------------------------------------------------


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def is_encoder_decoder(model: Any) -> bool:
    """Whether a transformers model, or the one in a PEFT wrapper, has an encoder for prompts."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def body_of(lm: PreTrainedModel) -> Any:
    """The part of a causal LM that returns hidden states.

    Raises:
        UserError: It has none under transformers' names.
    """
    for name in (lm.base_model_prefix, "model"):  # the prefix of Llama 4's text model is another class's
        body = getattr(lm, name, None)
        if isinstance(body, nn.Module):
            return body
    raise UserError(
        f"model.path: {type(lm).__name__} has no body that gives hidden states",
        "Log-probs and values are computed from hidden states.",
        "Use a decoder of another family, such as Llama, Qwen or Gemma.",
    )


def has_virtual_tokens(model: Any) -> bool:
    """Whether the model is PEFT's wrapper of a prompt-learning method, whose virtual tokens precede every text."""
    return hasattr(model, "active_peft_config") and bool(model.active_peft_config.is_prompt_learning)


def predicting_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Hidden states [n, H] that predict the response tokens, and these tokens [n]."""
    lm = causal_lm(model)
    if is_encoder_decoder(lm):
        parts = divided(lm, input_ids, attention_mask, response_mask)
        return decoder_states(model, parts)[parts.wanted], parts.targets[parts.wanted]
    hidden = hidden_states(model, input_ids, attention_mask, position_ids)
    predicts = response_mask[:, 1:]
    return hidden[:, :-1][predicts], input_ids[:, 1:][predicts]


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states [B, T, H] of a causal LM (adapters and virtual tokens included), without its logits.

    Rows are padded on the right. Where `position_ids` [B, T] are given, `attention_mask` says which tokens attend to
    which (see `rlhf.models.shared_prompt`), or is None where packed sequences are separated by positions from 0.
    """
    lm = causal_lm(model)
    if is_encoder_decoder(lm):
        raise UserError(
            f"{type(lm).__name__} is an encoder-decoder, which this step does not support",
            "Its encoder reads the prompt and its decoder the response; this step needs both as one text.",
            "Use a decoder (Llama, Qwen, ...).",
        )
    body = body_of(lm)
    if has_virtual_tokens(model):
        return _behind_virtual_tokens(model, body, input_ids, attention_mask)
    positions = {} if position_ids is None else {"position_ids": position_ids}
    if position_ids is None and next((m.is_causal for m in body.modules() if hasattr(m, "is_causal")), False):
        attention_mask = None  # causal attention never reaches padding on the right, and is faster without a mask
    elif position_ids is not None and attention_mask is None and body.config._attn_implementation == PACKED:
        attention_mask = sequence_lengths(position_ids)[None, None, None]
    output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
    return output.last_hidden_state


def _behind_virtual_tokens(
    model: nn.Module, body: nn.Module, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Hidden states [B, T, H] of the text without its virtual tokens, by PEFT's own forward without a head."""
    wrapper: Any = model
    rows, length = input_ids.shape
    learned = wrapper.get_prompt(batch_size=rows)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = torch.cat([mask.new_ones(rows, wrapper.active_peft_config.num_virtual_tokens), mask], 1)
    inputs: dict[str, Any]
    if isinstance(learned, Tensor):  # embeddings
        words = wrapper.word_embeddings(input_ids)
        inputs = {"inputs_embeds": torch.cat([learned.to(words.dtype), words], 1)}
    else:  # prefix tuning: a cache of keys and values
        inputs = {"input_ids": input_ids, "past_key_values": learned}
    return body(**inputs, attention_mask=mask, use_cache=False).last_hidden_state[:, -length:]


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """Lengths int64 [N] of packed sequences, from position ids [1, L] that start at 0 in each sequence."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]]))


# ---- attention of packed sequences on a CPU --------------------------------------------------------------------------
# A custom operator, so that torch.compile sees one node and does not break the graph of a layer.


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
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    wide, width = query.shape[-1], value.shape[-1]
    if width < wide:  # torch's kernel wants one size; zeros add nothing (DeepSeek-V3: keys of 192, values of 128)
        value = nn.functional.pad(value, (0, wide - width))
    found = attend_each(query, key, value, attention_mask.flatten(), scale, sliding_window or 0)[0]
    return found[..., :width], None


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


# ---- through the head ------------------------------------------------------------------------------------------------


class TokenPredictions(NamedTuple):
    """What a model predicts for chosen tokens, row by row."""

    logprobs: Tensor
    """float32 [n]."""
    entropies: Tensor
    """float32 [n], nats."""
    top1: Tensor | None
    """bool [n], whether the token is the most likely one; None unless asked for."""


def head_chunks(tokens: int, vocab_size: int) -> int:
    """The number of chunks in which the head processes `tokens` tokens; under ZeRO-3 all ranks must use the same."""
    elements = HEAD_CHUNK_ELEMENTS_GPU if torch.cuda.is_available() else HEAD_CHUNK_ELEMENTS
    return max(1, math.ceil(tokens * vocab_size / elements))


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    response_mask: Tensor,
    temperature: float,
    chunks: int | None = None,
    position_ids: Tensor | None = None,
    top1: bool = False,
) -> TokenPredictions:
    """Predictions of the response tokens; full logits exist for one chunk of tokens at a time.

    Args:
        model: A causal LM, or PEFT's wrapper around one.
        input_ids: int64 [B, T], prompt and response, padded on the right.
        attention_mask: [B, T], 1 where there is a token; None where packed (see `hidden_states`).
        response_mask: bool [B, T], True at the n response tokens (never the first of a sequence).
        temperature: Logits are divided by it, as they were when sampling.
        chunks: Number of chunks of the head; `head_chunks` of the tokens when left out.
        position_ids: [B, T]; see `hidden_states`.
        top1: Also say whether each token is the most likely one.
    """
    states, targets = predicting_states(model, input_ids, attention_mask, response_mask, position_ids)
    return head_logprobs(causal_lm(model), states, targets, temperature, chunks, top1)


def token_values(
    critic: Any, input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor, position_ids: Tensor | None
) -> Tensor:
    """Values float32 [n] of the states in which the response tokens were chosen; see `token_logprobs`. `critic` is a
    `rlhf.models.scalar.ScalarModel` with a value for every token."""
    states, _ = predicting_states(critic.model, input_ids, attention_mask, response_mask, position_ids)
    return scaled(critic, critic.model.score(states))


def scaled(scalar: Any, numbers: Tensor) -> Tensor:
    """`(number - mean) / std` of a scalar head's numbers [..., 1], float32 [...]; see `rlhf.models.scalar`."""
    return (numbers.squeeze(-1).float() - scalar.mean) / scalar.std


def head_logprobs(
    lm: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, chunks: int | None = None,
    top1: bool = False,
) -> TokenPredictions:  # fmt: skip
    """Predictions of `targets` [n] from hidden states [n, H]; see `token_logprobs`."""
    chunks = chunks or head_chunks(len(targets), lm.config.get_text_config().vocab_size)
    head = lm.get_output_embeddings()
    if is_frozen_product(lm):
        return TokenPredictions(*FrozenHead.apply(hidden, head, targets, temperature, chunks, top1))

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
    logprobs, entropies, *flags = (torch.cat(column) for column in zip(*parts))
    return TokenPredictions(logprobs, entropies, flags[0] if flags else None)


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
