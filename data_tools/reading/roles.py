"""What a field could hold, by its name: a prompt, a system turn, an answer, a judgement, or media.

Importers compare the fields that they read with this list, so that what a person wrote is never lost without a word.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
"""What the field of a system turn is called, where an importer reads it."""
SYSTEM = {"system", "sysprompt"}
WINNERS = {
    "better",
    "best",
    "worse",
    "worst",
    "safer",
    "winner",
    "choice",
    "preference",
    "preferences",
    "tie",
    "verdict",
}
"""Words that make a name a judgement wherever they are in it, such as better_response_id and winner_model."""
METADATA = {
    "id", "ids", "uid", "uuid", "model", "models", "name", "source", "type", "category", "language", "lang", "time",
    "date", "timestamp", "tokens", "length", "len", "url", "hash", "index", "idx", "count", "by", "author", "ratio",
    "metadata", "meta", "info",
}  # fmt: skip
"""Last words of names that hold facts about something else: prompt_id, chosen_model."""
NAMES = {"id", "ids", "index", "idx", "model", "by"}
"""Last words that can name a winner."""
COUNTS = {"num", "number", "count", "has"}
WORDS = {
    "prompt": {
        "prompt", "prompts", "question", "questions", "query", "instruction", "instructions", "input", "inputs",
        "context", "history", "conversation", "conversations", "messages", "chat", "dialogue", "dialog", "passage",
        "document", "article", "post", "text", "tools", "functions",
    },
    "answer": {
        "answer", "answers", "response", "responses", "resp", "output", "outputs", "completion", "completions",
        "chosen", "rejected", "candidate", "candidates", "reply", "replies", "generation", "generations", "target",
        "targets", "preferred", "summary", "summaries", "solution", "demonstration",
    },
    "judgement": {
        "label", "labels", "rank", "ranks", "ranking", "rating", "ratings", "score", "scores", "vote", "votes",
        "upvotes", "judgement", "judgment", "grade", "thumbs", "feedback", "strength", "safe",
    },
    "media": {"image", "images", "audio", "audios", "video", "videos", "picture", "photo", "screenshot", "media"},
}  # fmt: skip
"""Role -> words of a name that give it that role: a word of a judgement, else the last such word counts."""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``ResponseA`` and ``response_a`` are response and a."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())


def is_fact(name: str) -> bool:
    """Whether a name ends like that of a fact about something else: metadata, prompt_id."""
    words = [word for word in words_of(name[:200]) if len(word) > 1]
    return bool(words) and words[-1] in METADATA


@lru_cache(10_000)
def role_of(name: str) -> str | None:
    """prompt, system turn, answer, judgement or media; None where the name means neither."""
    words = [word for word in words_of(name[:200]) if len(word) > 1]
    if not words:
        return None
    facts = words[-1] in METADATA
    if WINNERS & set(words) and (not facts or words[-1] in NAMES):
        return "judgement"
    if facts or words[0] in COUNTS:
        return None
    if SYSTEM & set(words):
        return "system turn"
    if WORDS["judgement"] & set(words):
        return "judgement"
    return next((role for word in reversed(words) for role, known in WORDS.items() if word in known), None)


def says_something(value: Any, role: str) -> bool:
    """Whether a field of that role holds anything. A number alone is no prompt and no answer."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    if role in ("judgement", "media"):
        return value is not None and value != [] and value != {}
    return isinstance(value, (list, dict)) and bool(value)
