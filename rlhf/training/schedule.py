"""The learning-rate schedule of all stages."""

from __future__ import annotations

import math


def lr_scale(schedule: str, step: int, steps: int, warmup: int, first: int = 0) -> float:
    """The learning rate as a fraction of its peak: linear warm-up, then the schedule, which reaches 0 at `steps`.

    Args:
        schedule: `constant`, `linear` or `cosine`.
        step: Counted from 0.
        steps: Number of steps in the whole run.
        warmup: Number of warm-up steps.
        first: The warm-up starts at `first` / `warmup`: with 0 the first step has rate 0, with 1 the last warm-up step
            has the peak rate.
    """
    if step < warmup:
        return (step + first) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
