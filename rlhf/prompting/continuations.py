"""Log-probs of several continuations of many prompts, each prompt encoded once.

The last token of a continuation is only predicted, never read. So label words of one token cost nothing beyond their
prompt, and longer words share the row of their prompt (see `rlhf.models.shared_prompt`). The head sees only the
positions that predict a token of a continuation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf.core.console import track
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.inference.policy import BATCH_TOKENS, sequence_logprobs
from rlhf.models.forward import causal_lm, has_virtual_tokens, head_logprobs, hidden_states, is_encoder_decoder
from rlhf.models.shared_prompt import (
    NO_SHARING,
    PromptWithCompletions,
    SharedPrompts,
    attention_mask_of,
    detect_sharing,
    pad_rows,
    position_ids_of,
)
from rlhf.reward.scoring import batches_by_length

T = TypeVar("T")


def continuation_logprobs(
    model: Any, chat: ChatTokenizer, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Log-prob of each continuation of each prompt in nats at temperature 1, summed over its tokens.

    Args:
        model: A causal LM or an encoder-decoder in evaluation mode, or PEFT's wrapper around one. An encoder-decoder
            reads the prompt again for each continuation.
        chat: For padding.
        prompts: Token ids, at least one each.
        continuations: For each prompt, token ids of its continuations, at least one token each.

    Returns:
        [prompt][continuation].
    """
    if is_encoder_decoder(causal_lm(model)):
        return _of_encoder_decoder(model, chat, prompts, continuations)
    found = [[0.0] * len(several) for several in continuations]
    longest = max((len(p) + max(map(len, c)) for p, c in zip(prompts, continuations)), default=0)
    sharing = _sharing(model, continuations).for_length(longest)
    rows = [(i, part) for i, prompt in enumerate(prompts) for part in _parts(prompt, continuations[i], sharing)]

    def length(row: tuple[int, list[int]]) -> int:
        prompt, part = row
        return len(prompts[prompt]) + sum(len(continuations[prompt][k]) - 1 for k in part)

    with torch.no_grad():
        for batch in track(similar(rows, length), "log-probs", unit="batches"):
            texts = [(prompts[i], [continuations[i][k] for k in part]) for i, part in batch]
            places = ((i, k) for i, part in batch for k in part)
            for (prompt, continuation), total in zip(places, _totals(model, chat, texts)):
                found[prompt][continuation] = total
    return found


def _of_encoder_decoder(
    model: Any, chat: ChatTokenizer, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    rows = [([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens))
            for prompt, several in zip(prompts, continuations) for tokens in several]  # fmt: skip
    totals = iter([float(one.sum()) for one in sequence_logprobs(model, chat, rows, 1.0, "log-probs")])
    return [[next(totals) for _ in several] for several in continuations]


def _sharing(model: Any, continuations: Sequence[Sequence[Sequence[int]]]) -> SharedPrompts:
    if has_virtual_tokens(model) or not any(sum(len(c) > 1 for c in several) > 1 for several in continuations):
        return NO_SHARING  # PEFT's forward takes no such mask; and words of one token need no sharing
    with torch.no_grad():
        return detect_sharing(causal_lm(model), functools.partial(hidden_states, model))


def _parts(prompt: Sequence[int], continuations: Sequence[Sequence[int]], sharing: SharedPrompts) -> list[list[int]]:
    """The continuations of a prompt that are computed in one row; those of one token are in the first."""
    long = [k for k, tokens in enumerate(continuations) if len(tokens) > 1]
    groups = sharing.rows(len(prompt), [len(continuations[k]) - 1 for k in long])
    parts = [[long[place] for place in group] for group in groups] or [[]]
    parts[0] += [k for k, tokens in enumerate(continuations) if len(tokens) == 1]
    return parts


def similar(rows: Sequence[T], length: Callable[[T], int]) -> list[list[T]]:
    """Rows of similar length together, at most BATCH_TOKENS with padding unless one row has more."""
    return [[rows[i] for i in batch] for batch in batches_by_length(list(map(length, rows)), BATCH_TOKENS)]


def _totals(model: Any, chat: ChatTokenizer, rows: Sequence[PromptWithCompletions]) -> list[float]:
    """Log-prob of each continuation of each row."""
    weights = next(model.parameters())
    read = [(prompt, [tokens[:-1] for tokens in several if len(tokens) > 1] or [[]]) for prompt, several in rows]
    ids, mask, branches = pad_rows(chat, read, weights.device)
    if branches is None:
        hidden = hidden_states(model, ids, mask)
    else:
        implementation = causal_lm(model).config._attn_implementation
        sees = attention_mask_of(branches, str(implementation), weights.dtype)
        hidden = hidden_states(model, ids, sees, position_ids_of(branches))
    places, wanted = list[tuple[int, int]](), [tokens for _, several in rows for tokens in several]
    for row, (prompt, several) in enumerate(rows):
        start = len(prompt)
        for tokens in several:  # the first token is predicted at the prompt's last one, any other at the one before it
            after = start + len(tokens) - 1
            places += [(row, column) for column in (len(prompt) - 1, *range(start, after))]
            start = after
    at_rows, at_columns = torch.tensor(places).T
    targets = torch.tensor([token for tokens in wanted for token in tokens], device=weights.device)
    logprobs = head_logprobs(causal_lm(model), hidden[at_rows, at_columns], targets, 1.0)[0].double().cpu()
    return [float(part.sum()) for part in logprobs.split(list(map(len, wanted)))]


def embeddings(model: Any, chat: ChatTokenizer, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 [texts, H]: the mean of the last hidden states of each text's tokens, scaled to length 1."""
    found = np.zeros((len(texts), causal_lm(model).config.get_text_config().hidden_size), np.float32)
    with torch.no_grad():
        for batch in track(similar(range(len(texts)), lambda i: len(texts[i])), "embeddings", unit="batches"):
            ids, mask = chat.pad([texts[i] for i in batch], next(model.parameters()).device)
            hidden = hidden_states(model, ids, mask).float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return found
