"""Reward functions that the PPO tests name in their configs."""

from __future__ import annotations

import time


def letters(messages, answer):
    """The share of letters e in the answer."""
    return answer.count("e") / max(1, len(answer))


def one(messages, answer):
    return 1.0


def nothing(messages, answer):
    return 0.0


def broken(messages, answer):
    return float("nan")


def hangs(messages, answer):
    time.sleep(600)


calls = [0]


def growing(messages, answer):
    """Twice as large every few updates, whatever the answer is."""
    calls[0] += 1
    return (1 + answer.count("e")) * 2.0 ** (calls[0] / 12)
