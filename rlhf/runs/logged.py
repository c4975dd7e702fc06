"""The lines that a run has logged: read with what is wrong with them, cut back to the step from which it continues."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError

CUT_OFF = "is cut off, although the run is complete"


def logged_lines(file: Path, faults: list[str], complete: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The readable rows of a log, each after its place, such as `metrics.jsonl line 4`.

    Args:
        file: Lines of JSON objects with `step`; it may be absent.
        faults: What is wrong with a line is added here, as a sentence without a full stop that names the place.
        complete: Whether the run is complete. Else a part of a last line is no fault, since a crash or a write in
            progress leaves one.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        place, whole = f"{file.name} line {number:,}", line.endswith(b"\n")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if whole or complete:
                faults.append(f"{place} {'cannot be read' if whole else CUT_OFF}")
            continue
        if isinstance(row, dict) and (step := as_number(row.get("step"))) is not None and math.isfinite(step):
            yield place, row
        else:
            faults.append(f"{place} has no step: its `step` is not a finite number")


def as_number(value: Any) -> float | None:
    """A number as a float, which may be infinite or NaN; None for anything else, True and False included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def logged_numbers(place: str, row: Mapping[str, Any], faults: list[str]) -> dict[str, float]:
    """The metrics of a logged row. Those that are no numbers are left out and added to `faults`."""
    numbers = {}
    for name, value in row.items():
        number = as_number(value)
        if number is None:
            faults.append(f"{place}: {name} is {json.dumps(value)[:40]}, not a number")
        elif name != "step":
            numbers[name] = number
    return numbers


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
