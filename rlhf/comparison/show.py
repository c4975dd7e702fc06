"""The table of a comparison: rows in words, for the console, Markdown and the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.comparison.quality import Recommendation

COLUMNS = (
    "way", "quality", "95% interval", "seeds", "trained", "stored", "training", "memory", "prompt", "latency",
)  # fmt: skip
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class WayRow:
    """A way on a task: its quality and its costs, means over the seeds."""

    way: str
    about: str
    """What the way does, in a few words."""
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    """The value with each seed; one value for a way that does not depend on seeds."""
    records: int
    trained_parameters: int
    stored_bytes: int
    training_seconds: float
    peak_bytes: float | None
    """Highest memory of a training process; None without training or where the system does not report it."""
    prompt_tokens: float
    latency: float
    """Median seconds of a request that is alone."""

    @property
    def spread(self) -> str:
        """The number of seeds and the standard deviation of their values."""
        if len(self.by_seed) < 2:
            return "-"
        return f"{len(self.by_seed)}, \N{PLUS-MINUS SIGN}{statistics.stdev(self.by_seed):.3f}"

    def cells(self) -> tuple[str, ...]:
        """The row as texts under COLUMNS."""
        return (
            self.way, f"{self.value:.3f}", f"{self.low:.3f} to {self.high:.3f}", self.spread,
            amount(self.trained_parameters) if self.trained_parameters else "-",
            f"{amount(self.stored_bytes)}B" if self.stored_bytes else "-",
            seconds(self.training_seconds) if self.training_seconds else "-",
            f"{amount(self.peak_bytes)}B" if self.peak_bytes else "-",
            f"{self.prompt_tokens:.0f}", seconds(self.latency),
        )  # fmt: skip


@dataclass(frozen=True)
class TaskResult:
    """All that is known of a task so far."""

    name: str
    metric: str
    rows: list[WayRow]
    """In the order of the config; ways without a finished cell are left out."""
    curves: dict[str, list[tuple[int, float, float, float]]]
    """Way -> (training prompts, value, low, high), fewest first."""
    recommendation: Recommendation | None


def amount(value: float) -> str:
    """A count or a size with three digits: 950, 12.3k, 4.56M, 1.2G."""
    for size, letter in UNITS:
        if value >= size:
            scaled = value / size
            return f"{scaled:.3g}{letter}" if scaled < 1000 else f"{scaled:.0f}{letter}"
    return f"{value:.0f}"


LEGEND = (
    "seeds: how many, and the standard deviation of the quality between them; - for a way that was measured once, "
    "whose interval is over records only. trained: parameters. stored: what the task needs besides the base. "
    "training: time of the steps only. memory: the highest of a training process. prompt: mean tokens of a request, "
    "with examples and virtual tokens. latency: the median of requests that are made alone."
)
"""What the columns are."""


def seconds(value: float) -> str:
    """A time: 12 ms, 3.4 s, 5 min 06 s."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def markdown(title: str, facts: str, results: Sequence[TaskResult]) -> str:
    """The tables and recommendations as Markdown."""
    lines = [f"# {title}", "", facts, ""]
    for result in results:
        records = result.rows[0].records if result.rows else 0
        lines += [f"## {result.name}: {result.metric}, {records:,} records", "", "| " + " | ".join(COLUMNS) + " |"]
        lines += ["| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in result.rows]
        lines += ["", result.recommendation.text if result.recommendation else "Not complete yet.", ""]
    lines += [LEGEND, ""]
    return "\n".join(lines)
