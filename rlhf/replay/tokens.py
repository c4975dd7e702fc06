"""Per-token numbers of completions in a compact form, for samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.types import Experience
from rlhf.replay.recompute import shaped

MOST_TOKENS = 512
"""Tokens of a completion whose numbers are kept."""
CONTEXT = 8
"""Tokens before a token that decide how it is written: a character may take several tokens."""


def token_records(
    config: PPOConfig, chat: ChatTokenizer, experience: Experience, kl_coef: float, mean: float, std: float
) -> list[dict[str, Any]]:
    """The first `log.token_samples` completions token by token.

    Advantages and rewards are what an update would have made of these completions; estimators that compare the
    completions of a prompt give none, since an evaluation has one per prompt.

    Args:
        kl_coef: The present coefficient of the KL penalty.
        mean, std: What scores are normalised by at present.

    Returns:
        For each completion lists of the same length, with 4 decimals: `text`, `logprob`, `ref_logprob`, and where there
        are any `value`, `reward` and `advantage`. Texts joined are the completion; a token that ends it has none.
    """
    rollout = experience.rollout
    columns = {"logprob": experience.logprobs, "ref_logprob": experience.ref_logprobs, "value": experience.values}
    if config.advantage.row.traits["min_group"] < 2:
        made = shaped(config, experience, kl_coef, mean, std)
        columns |= {"reward": made.rewards, "advantage": made.advantages.advantages}
    records = []
    for row, completion in enumerate(rollout.completions[: config.log.token_samples]):
        ids = completion.ids[:MOST_TOKENS]
        numbers = {
            name: [round(value, 4) for value in column[row, : len(ids)].tolist()]
            for name, column in columns.items() if column is not None
        }  # fmt: skip
        records.append({"text": pieces(chat, ids), **numbers})
    return records


def pieces(chat: ChatTokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with the last of them."""
    found, start, pending = [], 0, 0
    for end in range(1, len(ids) + 1):
        start = max(start, pending - CONTEXT)
        before = chat.decode(ids[start:pending]) if pending > start else ""
        text = chat.decode(ids[start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        pending = end
    return found
