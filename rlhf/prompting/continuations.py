"""Log-probs of several continuations of many prompts, each prompt encoded once.

The last token of a continuation is only predicted, never read. So label words of one token cost nothing beyond their
prompt, and longer words share the row of their prompt (see `rlhf.models.shared_prompt`). The head sees only the
positions that predict a token of a continuation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf.core.console import track
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.inference.policy import BATCH_TOKENS, sequence_logprobs
from rlhf.models.forward import causal_lm, has_virtual_tokens, head_logprobs, hidden_states, is_encoder_decoder
from rlhf.models.shared_prompt import (
    NO_SHARING,
    SharedPrompts,
    attention_mask_of,
    detect_sharing,
    pad_rows,
    position_ids_of,
)
from rlhf.reward.scoring import batches_by_length

T = TypeVar("T")


@dataclass(frozen=True)
class _Row:
    """A prompt with continuations that are computed in one row."""

    prompt: Sequence[int]
    inputs: list[Sequence[int]]
    """The continuations without their last tokens, those of one token left out."""
    wanted: list[tuple[int, int, list[int], Sequence[int]]]
    """(prompt, continuation, positions in the row that predict its tokens, its tokens)."""

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.inputs))


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
    rows = [row for i, prompt in enumerate(prompts) for row in _rows(i, prompt, continuations[i], sharing)]
    with torch.no_grad():
        for batch in track(similar(rows, lambda row: row.length), "log-probs", unit="batches"):
            for (prompt, continuation), total in _totals(model, chat, batch):
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


def _rows(
    index: int, prompt: Sequence[int], continuations: Sequence[Sequence[int]], sharing: SharedPrompts
) -> Iterator[_Row]:
    long = [k for k, tokens in enumerate(continuations) if len(tokens) > 1]
    short = [k for k, tokens in enumerate(continuations) if len(tokens) == 1]
    last = len(prompt) - 1
    groups = sharing.rows(len(prompt), [len(continuations[k]) - 1 for k in long]) or [[]]
    for number, group in enumerate(groups):
        row = _Row(prompt, [], [])
        start = len(prompt)
        for k in (long[place] for place in group):
            tokens = continuations[k]
            row.inputs.append(tokens[:-1])
            row.wanted.append((index, k, [last, *range(start, start + len(tokens) - 1)], tokens))
            start += len(tokens) - 1
        if number == 0:
            row.wanted.extend((index, k, [last], continuations[k]) for k in short)
        yield row


def similar(rows: Sequence[T], length: Callable[[T], int]) -> list[list[T]]:
    """Rows of similar length together, at most BATCH_TOKENS with padding unless one row has more."""
    return [[rows[i] for i in batch] for batch in batches_by_length(list(map(length, rows)), BATCH_TOKENS)]


def _totals(model: Any, chat: ChatTokenizer, rows: Sequence[_Row]) -> Iterator[tuple[tuple[int, int], float]]:
    weights = next(model.parameters())
    ids, mask, branches = pad_rows(chat, [(row.prompt, row.inputs or [[]]) for row in rows], weights.device)
    if branches is None:
        hidden = hidden_states(model, ids, mask)
    else:
        implementation = causal_lm(model).config._attn_implementation
        sees = attention_mask_of(branches, str(implementation), weights.dtype)
        hidden = hidden_states(model, ids, sees, position_ids_of(branches))
    wanted = [(number, *one) for number, row in enumerate(rows) for one in row.wanted]
    places = [(number, place) for number, _, _, positions, _ in wanted for place in positions]
    states = hidden[torch.tensor([n for n, _ in places]), torch.tensor([p for _, p in places])]
    targets = torch.tensor([token for *_, tokens in wanted for token in tokens], device=weights.device)
    logprobs = head_logprobs(causal_lm(model), states, targets, 1.0)[0].double().cpu().numpy()
    ends = np.cumsum([len(tokens) for *_, tokens in wanted])
    for (_, prompt, continuation, _, _), part in zip(wanted, np.split(logprobs, ends[:-1])):
        yield (prompt, continuation), float(part.sum())


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
