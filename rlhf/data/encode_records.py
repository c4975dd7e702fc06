"""Records to rows of token ids: demonstrations, rankings, prompts.

A response is never truncated. If it leaves the prompt less than a quarter of max_length (and less than the prompt
needs), the demonstration or candidate is skipped and counted. A prompt that is too long keeps its end. A record that
the chat template refuses is rejected and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.core.console import printable, say, warn
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.schema import Demonstration, Message, Prompt, Ranking, dense_ranks


@dataclass
class EncodingCounts:
    """How many records were kept, truncated, and skipped by reason."""

    kept: int = 0
    truncated_prompts: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)
    """Records that cannot become tokens: `reason`, `place` (FILE:LINE where it is known), `id`, `prompt_id`, `source`,
    `fault` and `remedy` of each; also in `skipped`."""

    def refuse(self, record: Prompt, error: RefusedText) -> None:
        """Count a record that cannot become tokens."""
        self.skipped[error.reason] += 1
        ids = {"id": record.id, "prompt_id": record.prompt_id}
        place = {"place": printable(record.place), **ids, "source": printable(record.source)}
        self.refused.append({"reason": error.reason, **place, "fault": error.what, "remedy": error.remedy})

    def report(self, what: str) -> None:
        """Print the counts in one line."""
        parts = [f"{self.kept:,} {what}"]
        if self.truncated_prompts:
            parts.append(f"{self.truncated_prompts:,} prompts truncated to their end")
        parts += [f"{count:,} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        say("  ".join(("Data:", *parts)))
        self.report_refused(what)

    def report_refused(self, what: str) -> None:
        """Print how many were refused, the first of each kind with its place, and what to do."""
        for reason in dict.fromkeys(row["reason"] for row in self.refused):
            rows = [row for row in self.refused if row["reason"] == reason]
            warn(f"{len(rows):,} {what} rejected, {first_refused(rows)}")


def first_refused(rows: Sequence[Mapping[str, str]]) -> str:
    """The place, fault and remedy of the first of `EncodingCounts.refused`, as the end of a sentence."""
    first = rows[0]
    where = f"the first at {first['place']}, record" if first["place"] else "the first is record"
    ids = f"{first['id']}, prompt {first['prompt_id']}" if first["id"] != first["prompt_id"] else first["id"]
    source = f" ({first['source']})" if first["source"] else ""
    return f"{where} {ids}{source}: {first['fault']}. {first['remedy']}"


def fits(response: int, prompt: int, max_length: int) -> bool:
    """Whether a response leaves enough room: at least a quarter of `max_length`, or as much as the prompt needs."""
    return response <= max_length - min(prompt, max_length // 4)


def best_response(record: Demonstration | Ranking) -> str:
    """The response of a demonstration, or the best-ranked candidate of a ranking (the first of several)."""
    if isinstance(record, Ranking):
        return record.candidates[record.ranks.index(min(record.ranks))].text
    return record.answer


def encode_demonstration(
    record: Demonstration | Ranking, chat: ChatTokenizer, max_length: int, counts: EncodingCounts
) -> dict[str, Any] | None:
    """The row of a demonstration, or of a ranking's best response. None if the response does not fit or the
    template refuses the conversation.

    Labels are -100 except at the tokens of every assistant turn.
    """
    try:
        ids, is_response = chat.conversation([*record.messages, Message("assistant", best_response(record))])
    except RefusedText as error:
        counts.refuse(record, error)
        return None
    response = next((i for i, flag in enumerate(reversed(is_response)) if not flag), len(is_response))
    if not fits(response, len(ids) - response, max_length):
        counts.skipped[f"response does not fit in {max_length} tokens"] += 1
        return None
    labels = [token if flag else -100 for token, flag in zip(ids, is_response)]
    if len(ids) > max_length:
        counts.truncated_prompts += 1
        labels = labels[len(ids) - max_length :]
        ids = chat.truncate_prompt(ids, max_length)
        labels[0] = -100
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def encode_step_by_step(
    record: Demonstration | Ranking, chat: ChatTokenizer, max_length: int, counts: EncodingCounts,
    parts: Callable[[str], tuple[str, str] | None], label_prefix: str, rationale_prefix: str,
) -> dict[str, Any] | None:  # fmt: skip
    """The row of a demonstration with two tasks: prompt -> label and prompt -> rationale, each with its prefix.

    None if a task does not fit or is refused, or the text has no label. A text without a rationale has empty columns.

    Args:
        parts: Text -> its rationale, which may be empty, and its label; None where there is no label.
        label_prefix: Begins the last user message in the label task.
        rationale_prefix: The same in the rationale task.
    """
    found = parts(best_response(record))
    if found is None:
        counts.skipped["no label is found in the answer (distillation.step_by_step.pattern)"] += 1
        return None
    rationale, label = found
    *before, last = record.messages

    def task(prefix: str, answer: str) -> dict[str, Any] | None:
        messages = (*before, Message(last.role, prefix + last.content))
        derived = Demonstration(messages, record.source, record.group, record.split, answer=answer)
        return encode_demonstration(derived, chat, max_length, counts)

    row = task(label_prefix, label)
    other: dict[str, Any] | None = {"input_ids": [], "labels": [], "length": 0}
    if row and rationale:
        other = task(rationale_prefix, rationale)
    if row is None or other is None:
        return None
    both = {"rationale_ids": other["input_ids"], "rationale_labels": other["labels"]}
    return row | both | {"length": row["length"] + other["length"]}


def encode_ranking(
    record: Ranking, chat: ChatTokenizer, max_length: int, counts: EncodingCounts
) -> dict[str, Any] | None:
    """The row of a ranking: one prompt and the candidates that fit. None if fewer than two fit or it is refused."""
    try:
        prompt = chat.prompt(record.messages)
        responses = [chat.response(candidate.text) for candidate in record.candidates]
    except RefusedText as error:
        counts.refuse(record, error)
        return None
    fit = [i for i, response in enumerate(responses) if fits(len(response), len(prompt), max_length)]
    if len(fit) < len(responses):
        counts.skipped[f"candidates that do not fit in {max_length} tokens"] += len(responses) - len(fit)
    if len(fit) < 2:
        counts.skipped["rankings with fewer than two candidates that fit"] += 1
        return None
    longest = max(len(responses[i]) for i in fit)
    counts.truncated_prompts += len(prompt) > max_length - longest
    prompt = chat.truncate_prompt(prompt, max_length - longest)
    kept = [record.candidates[i] for i in fit]
    return {
        "prompt": prompt,
        "candidates": [responses[i] for i in fit],
        "ranks": list(dense_ranks(record.ranks[i] for i in fit)),
        "ratings": [candidate.score for candidate in kept],
        "characters": [len(candidate.text) for candidate in kept],
        "source": record.source,
        "annotator": record.annotator,
        "group": record.group,
        "weight": record.weight,
        "length": len(prompt) + longest,
    }


def encode_prompt(
    record: Prompt, chat: ChatTokenizer, max_length: int, counts: EncodingCounts, others: Sequence[ChatTokenizer] = ()
) -> dict[str, Any] | None:
    """The row of a prompt: its id, its last `max_length` tokens, and its messages as JSON. None if it is refused.

    `others` are tokenizers that must accept it too: those of reward models that read text in their own tokens.
    """
    try:
        ids = chat.prompt(record.messages)
        for other in others:
            other.prompt(record.messages)
    except RefusedText as error:
        counts.refuse(record, error)
        return None
    counts.truncated_prompts += len(ids) > max_length
    return {
        "id": record.prompt_id,
        "prompt": chat.truncate_prompt(ids, max_length),
        "messages": json.dumps(record.chat),
    }
