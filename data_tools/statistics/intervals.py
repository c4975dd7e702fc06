"""Estimates with 95 % intervals, by Wilson's formula or by the bootstrap over prompts. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf.core.intervals import Z_95, effective_size, resampled_sums, wilson
from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    from scipy import stats
else:
    stats = lazy("scipy.stats")  # half a second, which an import of rankings does without

FEWEST_REPLICATES, REPLICATES, MOST_DRAWS = 200, 1000, 50_000_000
"""Fewer replicates are drawn for many rows, whose interval is narrow."""
FEWEST_ROWS = 10
"""Of fewer rows the bootstrap's interval is too narrow: rows that happen to be equal give one of width 0."""
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval (None if it has none)."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Number of units that the value is computed from."""
    note: str = ""
    """What the value does not say, such as names."""


def fraction_of(successes: float, trials: float, size: float | None = None) -> Estimate | None:
    """A fraction with Wilson's interval for `size` independent trials (all of them by default); None without trials."""
    if not trials > 0:
        return None
    value = float(successes / trials)
    low, high = wilson(value, size or trials)
    return Estimate(value, min(low, value), max(high, value), round(trials))


def clustered_fraction(
    successes: np.ndarray, trials: np.ndarray, n: int | None = None, most: float | None = None
) -> Estimate | None:
    """A fraction of trials that come in clusters (the pairs of one prompt), with Wilson's interval.

    The interval's sample size is `effective_size`, times (z / t)² with the 97.5 % quantiles of the normal distribution
    and of Student's t with clusters - 1 degrees of freedom, since few clusters say little about their own variance
    (Korn and Graubard 1998). Where they show no variance at all, each cluster counts as one trial.

    Args:
        successes, trials: (clusters,) counts; clusters without trials are skipped.
        n: What the estimate reports as its number of units; by default the number of trials.
        most: The interval's sample size is at most this; by default the number of trials.

    Returns:
        None without any trial.
    """
    successes, trials = successes[trials > 0].astype(float), trials[trials > 0].astype(float)
    clusters, size = len(trials), effective_size(successes, trials)
    if size is None:
        size = float(clusters)
    elif (trials > 1).any():
        size = max(1.0, size * (Z_95 / float(stats.t.ppf(0.975, clusters - 1))) ** 2)
    found = fraction_of(successes.sum(), trials.sum(), min(size, most or size))
    return found and replace(found, n=found.n if n is None else n)


def fraction_by_prompt(prompt: np.ndarray, hit: np.ndarray) -> Estimate | None:
    """The fraction of hits, with an interval that treats everything of one prompt as one cluster.

    Args:
        prompt: (n,) any integers.
        hit: (n,) bool.
    """
    _, cluster = np.unique(prompt, return_inverse=True)
    return clustered_fraction(np.bincount(cluster, hit), np.bincount(cluster))


def bootstrapped(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int | None = None
) -> Estimate | None:
    """A statistic of column sums with the percentile interval of its bootstrap over the rows.

    Args:
        values: (rows, columns) float.
        statistic: (any, columns) sums -> (any,) values; NaN if undefined.

    Returns:
        None without rows, or if the statistic is NaN. Of fewer than `FEWEST_ROWS` rows there is no interval.
    """
    if not len(values):
        return None
    value = float(statistic(values.sum(axis=0, keepdims=True))[0])
    if np.isnan(value):
        return None
    if len(values) < FEWEST_ROWS:
        return Estimate(value, n=n)
    replicates = max(FEWEST_REPLICATES, min(REPLICATES, MOST_DRAWS // len(values)))
    values_drawn = statistic(resampled_sums(values, replicates))
    low, high = np.nanquantile(values_drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column divided by the second; NaN if that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
