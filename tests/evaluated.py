"""Measurements by `rlhf evaluate`, and reward functions for them."""

from __future__ import annotations

from typing import Any

import finished

from stages.evaluate import command


def metrics_of(*words: Any) -> dict[str, Any]:
    sampled = {"--reward", "--judge", "--reference"} & set(words) and "rankings" not in words
    said, _ = finished.invoke(command, *words, *(("--max-new-tokens", 8) if sampled else ()), "--json")
    return finished.last_json(said)


def letters(messages: list[dict[str, str]], answer: str) -> float:
    return sum(c.isalpha() for c in answer)


def constant(messages: list[dict[str, str]], answer: str) -> float:
    return 1.0
