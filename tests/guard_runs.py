"""Reward functions and rules of the guard's tests in PPO."""

from __future__ import annotations

from rlhf.core.table import Pick, TableRow
from rlhf.guard.rules import SCORE, History


def fewer_letters(messages, answer):
    """A gold reward that falls as the policy learns to write the letter e."""
    return 1 - answer.count("e") / max(1, len(answer))


def not_a_number(messages, answer):
    return float("nan")


def _two_updates(history: History) -> str | None:
    return f"{len(history.recent[SCORE])} updates" if len(history.recent[SCORE]) >= 2 else None


AFTER_TWO = Pick(TableRow("after-two", _two_updates), {})
"""A rule that holds from update 2 on, whatever the metrics are."""


def guard(**values):
    """A guard that fires at update 2."""
    return {"rules": [AFTER_TWO], "patience": 1, "cooldown": 1, **values}
