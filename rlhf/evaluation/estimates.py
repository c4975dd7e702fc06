"""Means and fractions of values that come in clusters (the pairs of a prompt), with 95% intervals, and p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlhf.reward.metrics import accuracy_interval


@dataclass(frozen=True)
class Mean:
    """A mean over clustered values. Error, interval and p-value are NaN with fewer than two clusters."""

    value: float
    error: float
    """Standard error of the mean, clusters taken to be independent."""
    clusters: int
    count: int

    @property
    def low(self) -> float:
        return self.value - self._reach

    @property
    def high(self) -> float:
        return self.value + self._reach

    @property
    def _reach(self) -> float:
        return float(stats.t.ppf(0.975, self.clusters - 1)) * self.error if self.clusters > 1 else math.nan

    @property
    def p_value(self) -> float:
        """Of the two-sided t test that the mean is 0; 1 where all values are 0."""
        if self.clusters < 2:
            return math.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.value / self.error), self.clusters - 1))

    def scaled(self, factor: float) -> Mean:
        """The mean of the values times `factor` > 0."""
        return Mean(self.value * factor, self.error * factor, self.clusters, self.count)


def clustered_mean(values: NDArray[Any], clusters: NDArray[Any]) -> Mean:
    """The mean of all values, with the linearised standard error over clusters.

    error² = c/(c-1) · Σ(s - m·n)² / N², with s and n the sum and the number of values of a cluster, m the mean, c the
    number of clusters (see `rlhf.core.intervals.effective_size`); intervals use Student's t with c - 1 degrees of
    freedom.

    Args:
        values: float [N], N > 0.
        clusters: int [N], which cluster each value belongs to.
    """
    _, index = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    count, total = len(sizes), len(values)
    mean = float(values.sum() / total)
    if count < 2:
        return Mean(mean, math.nan, count, total)
    variance = float(((sums - mean * sizes) ** 2).sum()) * count / (count - 1) / total**2
    return Mean(mean, math.sqrt(variance), count, total)


def fraction(credit: NDArray[Any], clusters: NDArray[Any]) -> dict[str, Any]:
    """A fraction with Wilson's interval for clusters, for JSON; see `rlhf.reward.metrics.accuracy_interval`.

    Args:
        credit: [N], 1 or 0, halves are allowed.
        clusters: int [N].

    Returns:
        `value` (None without values), `low`, `high` (None with fewer than two clusters, whose spread is not known),
        `count` (N), `prompts` (the number of clusters).
    """
    if not len(credit):
        return {"value": None, "low": None, "high": None, "count": 0, "prompts": 0}
    _, index = np.unique(clusters, return_inverse=True)
    prompts = int(index.max()) + 1
    bounds = accuracy_interval(np.bincount(index, credit), np.bincount(index)) if prompts > 1 else None
    low, high = bounds or (None, None)
    counts = {"count": len(credit), "prompts": prompts}
    return {"value": float(np.mean(credit)), "low": low, "high": high, **counts}


def mean_facts(mean: Mean) -> dict[str, Any]:
    """The same keys for a mean that is no fraction; its bounds are None with fewer than two clusters."""
    low, high = (None, None) if math.isnan(mean.error) else (mean.low, mean.high)
    return {"value": mean.value, "low": low, "high": high, "count": mean.count, "prompts": mean.clusters}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) corrected p-values: the chance of one false alarm among all tests stays below the level.

    The i-th smallest of m, counted from 0, is multiplied by m - i; none becomes smaller than one before it or above 1.
    A NaN stays NaN and is not counted.
    """
    valid = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    found, largest = [math.nan] * len(p_values), 0.0
    for place, (p, index) in enumerate(valid):
        largest = max(largest, min(1.0, p * (len(valid) - place)))
        found[index] = largest
    return found
