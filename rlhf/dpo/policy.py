"""The policy as the engine calls it: log-probs of whole answers, under the policy or the reference it started from."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.dpo.batches import PreferenceBatch
from rlhf.models.forward import causal_lm, has_virtual_tokens, head_logprobs, hidden_states, token_logprobs
from rlhf.models.shared_prompt import NO_SHARING, SharedPrompts, attention_mask_of, detect_sharing, position_ids_of
from rlhf.tuning.merging import adapters_off


class PreferencePolicy(nn.Module):
    """A causal LM, perhaps in PEFT's wrapper, that returns the log-prob of every answer of a batch of rankings.

    Args:
        model: The causal LM.
        goes_on: Whether it started with a trained adapter, which is then part of the reference.
    """

    def __init__(self, model: Any, goes_on: bool = False) -> None:
        super().__init__()
        self.model, self.goes_on = model, goes_on

    def forward(self, batch: PreferenceBatch, chunks: int, reference: bool = False) -> Tensor:
        """Log-probs float32 [N] of the answers in nats, summed over their tokens.

        Args:
            batch: N answers.
            chunks: Number of chunks of the head; see `rlhf.models.forward.head_chunks`.
            reference: Without new adapters and virtual tokens. Before training this is the reference in any case.
        """
        if not reference or self.goes_on:
            return answer_logprobs(self.model, batch, chunks)
        with adapters_off(self.model) as base:
            return answer_logprobs(base, batch, chunks)


def answer_logprobs(model: nn.Module, batch: PreferenceBatch, chunks: int) -> Tensor:
    """See `PreferencePolicy.forward`. Logits exist for one chunk of the answers' tokens at a time."""
    ids, mask = batch.input_ids, batch.attention_mask
    if batch.branches is not None:
        logprobs = _on_shared_prompts(model, ids, batch.branches, chunks)
    else:  # a row ends with its one answer
        place = mask.cumsum(1)
        wanted = (mask > 0) & (place > place[:, -1:] - torch.tensor(batch.tokens, device=ids.device)[:, None])
        logprobs = token_logprobs(model, ids, mask, wanted, 1.0, chunks).logprobs
    return torch.stack([part.sum() for part in logprobs.split(batch.tokens)])


def _on_shared_prompts(model: nn.Module, ids: Tensor, branches: Tensor, chunks: int) -> Tensor:
    """Log-probs of the answers' tokens [n], answer by answer."""
    lm = causal_lm(model)
    starts = branches > 0
    starts[:, 1:] &= branches[:, 1:] != branches[:, :-1]
    # The first token of an answer is predicted at the prompt's last token, any other at the token before it.
    column = torch.arange(branches.shape[1], device=branches.device).expand_as(branches)
    predicted_at = torch.where(starts, (branches == 0).sum(1, keepdim=True), column) - 1
    rows, columns = ((branches > 0) & (predicted_at >= 0)).nonzero(as_tuple=True)
    sees = attention_mask_of(branches, lm.config._attn_implementation, next(lm.parameters()).dtype)
    states = hidden_states(model, ids, sees, position_ids_of(branches))[rows, predicted_at[rows, columns]]
    return head_logprobs(lm, states, ids[rows, columns], 1.0, chunks).logprobs


@torch.no_grad()
def sharing_of(model: Any) -> SharedPrompts:
    """Which answers can share a row with their prompt, tested on the model. Every rank calls it, before training."""
    if has_virtual_tokens(model):
        return NO_SHARING  # PEFT's own forward takes no mask of ours
    training = model.training
    model.eval()
    found = detect_sharing(causal_lm(model), functools.partial(hidden_states, model))
    model.train(training)
    return found
