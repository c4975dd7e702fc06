"""What runs have logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMINGS = ("time/", "throughput/", "memory/")
"""Prefixes of the metrics that differ between two runs of the same config."""


def lines(run: str | Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl, without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (Path(run) / name).read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMINGS)} for row in rows]


def updates(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a PPO run's updates, without its evaluations."""
    return [row for row in lines(run) if "objective/kl_coef" in row]
