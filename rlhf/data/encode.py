"""Records to token rows: demonstrations, rankings, prompts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.core.console import say
from rlhf.core.lazy import lazy
from rlhf.data.chat import ChatTokenizer
from rlhf.data.schema import Demonstration, Message, Prompt, Ranking, dense_ranks

if TYPE_CHECKING:
    import torch
    import transformers
else:
    torch, transformers = lazy("torch"), lazy("transformers")


# ---- records to rows ----------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What became of the records: kept, cut, set aside by reason."""

    kept: int = 0
    cut_prompts: int = 0
    aside: Counter[str] = field(default_factory=Counter)

    def report(self, what: str) -> None:
        """Say it in a line."""
        parts = [f"{self.kept:,} {what}"]
        if self.cut_prompts:
            parts.append(f"{self.cut_prompts:,} prompts cut to their end")
        parts += [f"{count:,} set aside: {reason}" for reason, count in sorted(self.aside.items())]
        say("  ".join(("Data:", *parts)))


def _fits(answer: int, prompt: int, max_length: int) -> bool:
    return answer <= max_length - min(prompt, max_length // 4)


def best_answer(record: Demonstration | Ranking) -> str:
    """A demonstration's answer; of a ranking, the best-ranked candidate (the first of several)."""
    if isinstance(record, Ranking):
        return record.candidates[record.ranks.index(min(record.ranks))].text
    return record.answer


def encode_demonstration(
    record: Demonstration | Ranking, chat: ChatTokenizer, max_length: int, counts: Counts
) -> dict[str, Any] | None:
    """A demonstration's row: every assistant turn is trained on. None when its answer does not fit.

    Of a ranking, the best answer is the demonstration.
    """
    ids, mine = chat.conversation([*record.messages, Message("assistant", best_answer(record))])
    answer = next((i for i, flag in enumerate(reversed(mine)) if not flag), len(mine))
    if not _fits(answer, len(ids) - answer, max_length):
        counts.aside[f"answer does not fit in {max_length} tokens"] += 1
        return None
    labels = [token if flag else -100 for token, flag in zip(ids, mine)]
    if len(ids) > max_length:
        counts.cut_prompts += 1
        labels = labels[len(ids) - max_length :]
        ids = chat.cut_prompt(ids, max_length)
        labels[0] = -100
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def encode_ranking(record: Ranking, chat: ChatTokenizer, max_length: int, counts: Counts) -> dict[str, Any] | None:
    """A ranking's row: one prompt and its K candidates, K being what fits. None when fewer than two are left."""
    prompt = chat.prompt(record.messages)
    answers = [chat.answer(candidate.text) for candidate in record.candidates]
    fit = [i for i, answer in enumerate(answers) if _fits(len(answer), len(prompt), max_length)]
    if len(fit) < len(answers):
        counts.aside[f"candidates that do not fit in {max_length} tokens"] += len(answers) - len(fit)
    if len(fit) < 2:
        counts.aside["rankings with fewer than two candidates that fit"] += 1
        return None
    room = max_length - max(len(answers[i]) for i in fit)
    counts.cut_prompts += len(prompt) > room
    prompt = chat.cut_prompt(prompt, room)
    kept = [record.candidates[i] for i in fit]
    return {
        "prompt": prompt,
        "candidates": [answers[i] for i in fit],
        "ranks": list(dense_ranks(record.ranks[i] for i in fit)),
        "ratings": [candidate.score for candidate in kept],
        "characters": [len(candidate.text) for candidate in kept],
        "source": record.source,
        "annotator": record.annotator,
        "group": record.group,
        "weight": record.weight,
        "length": len(prompt) + max(len(answers[i]) for i in fit),
    }


def encode_prompt(record: Prompt, chat: ChatTokenizer, max_length: int, counts: Counts) -> dict[str, Any]:
    """A prompt's row for PPO: its tokens (at most `max_length`, the end) and its messages as JSON."""
    ids = chat.prompt(record.messages)
    counts.cut_prompts += len(ids) > max_length
    return {"id": record.prompt_id, "prompt": chat.cut_prompt(ids, max_length), "messages": json.dumps(record.chat)}
