"""Intervals: how far a figure may be off, given how many prompts it rests on. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy("numpy")

Z = 1.959963984540054  # 95 %
REPLICATES = 1000
FEWEST_REPLICATES, MOST_DRAWS = 200, 50_000_000
"""Of the bootstrap of many rows, whose interval is narrow anyway, fewer replicates are taken."""
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval (None where it has none), and how many units it rests on."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""
    """What the figure alone does not say, such as names."""


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        successes: From 0 to `n`; need not be whole.
        n: Independent trials, above 0.
    """
    share, square = successes / n, Z * Z
    middle = share + square / (2 * n)
    reach = Z * (share * (1 - share) / n + square / (4 * n * n)) ** 0.5
    low, high = (float((middle + side) / (1 + square / n)) for side in (-reach, reach))
    return low if successes > 0 else 0.0, high if successes < n else 1.0


def clustered_share(successes: np.ndarray, trials: np.ndarray) -> Estimate | None:
    """A share over trials that come in clusters (the pairs of one prompt), with Wilson's interval.

    The number of trials is divided by the design effect, the ratio of the share's linearised between-cluster variance
    c/(c-1) · Σ(s_i - p·t_i)² / (Σt_i)² to the variance p(1-p)/Σt_i of independent trials, where that is above 1
    (Kish 1965; Wilson's interval on the effective size: Korn and Graubard 1998).

    Args:
        successes, trials: (clusters,) counts; clusters without trials are passed over.

    Returns:
        None without any trial. `n` counts the trials.
    """
    there = trials > 0
    successes, trials = successes[there].astype(float), trials[there].astype(float)
    total, clusters = trials.sum(), len(trials)
    if not total:
        return None
    share = successes.sum() / total
    independent = share * (1 - share) / total
    effect = 1.0
    if clusters > 1 and independent > 0:
        between = clusters / (clusters - 1) * np.square(successes - share * trials).sum() / total**2
        effect = max(1.0, between / independent)
    low, high = wilson(share * total / effect, total / effect)
    return Estimate(float(share), float(low), float(high), int(total))


def resampled_sums(values: np.ndarray, replicates: int = REPLICATES, seed: int = SEED) -> np.ndarray:
    """Column sums under the bootstrap (Efron 1979): as many rows drawn with replacement as there are, again and again.

    Args:
        values: (rows, columns), a row for each prompt, so that whole prompts are resampled.

    Returns:
        (replicates, columns). Any statistic of the column sums can be taken of each.
    """
    generator = np.random.default_rng(seed)
    rows = len(values)
    sums = np.empty((replicates, values.shape[1]))
    for index in range(replicates):
        sums[index] = np.bincount(generator.integers(0, rows, rows), minlength=rows) @ values
    return sums


def bootstrapped(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int | None = None
) -> Estimate | None:
    """A statistic of column sums with the percentile interval of its bootstrap over the rows.

    Args:
        values: (rows, columns) float.
        statistic: (any, columns) sums -> (any,) figures; NaN where it has none.

    Returns:
        None without rows, or where the statistic is NaN.
    """
    if not len(values):
        return None
    value = float(statistic(values.sum(axis=0, keepdims=True))[0])
    if np.isnan(value):
        return None
    if len(values) == 1:
        return Estimate(value, n=n)
    replicates = max(FEWEST_REPLICATES, min(REPLICATES, MOST_DRAWS // len(values)))
    figures = statistic(resampled_sums(values, replicates))
    low, high = np.nanquantile(figures, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column divided by the second; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
