"""Means and fractions of values that come in clusters (the pairs of a prompt), with 95% intervals, and p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from rlhf.core.intervals import fraction_interval


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """The mean of all values, with Student's t interval of its linearised standard error over clusters, for JSON.

    error² = c/(c-1) · Σ(s - m·n)² / N², with s and n the sum and the number of values of a cluster, m the mean, c the
    number of clusters (see `rlhf.core.intervals.effective_size`); t has c - 1 degrees of freedom.

    Args:
        values: float [N], N > 0.
        clusters: [N], which cluster each value belongs to.

    Returns:
        `value`, `low`, `high` (None with fewer than two clusters), `count` (N), `prompts` (the number of clusters).
    """
    mean, error, count = _mean_and_error(values, clusters)
    reach = None if error is None else float(stats.t.ppf(0.975, count - 1)) * error
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return {"value": mean, "low": low, "high": high, "count": len(values), "prompts": count}


def p_value(values: np.ndarray, clusters: np.ndarray) -> float:
    """Of the two-sided t test that the mean of `clustered_mean` is 0; 1 where all values are 0, NaN for one cluster."""
    mean, error, count = _mean_and_error(values, clusters)
    if not error:
        return math.nan if error is None else float(mean == 0)
    return float(2 * stats.t.sf(abs(mean / error), count - 1))


def _mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None, int]:
    """The mean, its standard error (None with fewer than two clusters), and the number of clusters."""
    _, index = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    count, total = len(sizes), len(values)
    mean = float(values.sum() / total)
    if count < 2:
        return mean, None, count
    return mean, math.sqrt(float(((sums - mean * sizes) ** 2).sum()) * count / (count - 1)) / total, count


def fraction(credit: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """A fraction with Wilson's interval for clusters, for JSON; see `rlhf.core.intervals.fraction_interval`.

    Args:
        credit: [N], 1 or 0, halves are allowed.
        clusters: [N].

    Returns:
        `value` (None without values), `low`, `high` (None with fewer than two clusters, whose spread is not known),
        `count` (N), `prompts` (the number of clusters).
    """
    if not len(credit):
        return {"value": None, "low": None, "high": None, "count": 0, "prompts": 0}
    _, index = np.unique(clusters, return_inverse=True)
    prompts = int(index.max()) + 1
    bounds = fraction_interval(np.bincount(index, credit), np.bincount(index)) if prompts > 1 else None
    low, high = bounds or (None, None)
    return {"value": float(np.mean(credit)), "low": low, "high": high, "count": len(credit), "prompts": prompts}


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
