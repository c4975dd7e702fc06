"""Findings about a run, and the table of checks that the other modules of this package fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf.core.console import format_number
from rlhf.doctor.evidence import Evidence

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""`error`: the result cannot be trusted. `warning`: the run probably goes wrong. `note`: worth a look."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    name: str
    """The check that found it."""
    severity: Severity
    what: str
    """What was seen, with its values."""
    cause: str
    """The usual causes."""
    remedy: str
    """What to do."""


@dataclass(frozen=True)
class Check:
    """A row of `CHECKS`."""

    name: str
    severity: Severity
    stages: tuple[str, ...]
    live: bool
    cause: str
    remedy: str
    fn: Callable[[Evidence], str | None]


CHECKS: list[Check] = []
SUPERVISED = ("sft", "reward", "dpo", "specialist")
ALL = ("ppo", *SUPERVISED)


def check(
    name: str, severity: Severity, stages: Iterable[str], cause: str, remedy: str, live: bool = True
) -> Callable[[Callable[[Evidence], str | None]], Callable[[Evidence], str | None]]:
    """Decorator that adds a check: a function that says what it saw, or None where all is well.

    Args:
        name: What the finding is called.
        severity: How bad it is.
        stages: Where the check applies.
        cause: The usual causes, in words.
        remedy: What to do.
        live: Whether it also watches while the run trains; False for checks that need more than metrics.
    """

    def add(fn: Callable[[Evidence], str | None]) -> Callable[[Evidence], str | None]:
        CHECKS.append(Check(name, severity, tuple(stages), live, cause, remedy, fn))
        return fn

    return add


def number(value: float) -> str:
    """A value of a metric as findings print it."""
    return format_number(value, 3)
