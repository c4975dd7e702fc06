"""The lines that a run has logged, cut back to the step from which it continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.core.errors import UserError


def lines_until(step: int, lines: Sequence[bytes], file: Path) -> list[bytes]:
    """The lines up to `step`. Damaged ones after the last of these are what a crash left, and are dropped too.

    Raises:
        UserError: A line before the last of these is damaged.
    """
    steps = [_step_of(line) for line in lines]
    kept = [index for index, at in enumerate(steps) if at is not None and at <= step]
    for index in range(kept[-1] if kept else 0):
        if steps[index] is None:
            raise UserError(
                f"{file}: line {index + 1} is damaged",
                "Continuing would leave a hole in what the run has logged.",
                "Repair or delete that line, then use --resume again.",
            )
    return [lines[index] for index in kept]


def _step_of(line: bytes) -> float | None:
    """The step of a logged line; None if it is damaged or was cut off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
