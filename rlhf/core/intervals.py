"""Wilson's interval for a fraction, the sample size to use with it for clusters, and replicates of the bootstrap."""

from __future__ import annotations

import math

from rlhf.core.lazy import np

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


def wilson(fraction: float, n: float) -> tuple[float, float]:
    """95 % score interval of a fraction: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927).

    Args:
        fraction: p, from 0 to 1.
        n: Number of independent trials, above 0; need not be whole.
    """
    centre, shrink = fraction + Z_95**2 / (2 * n), 1 + Z_95**2 / n
    half = Z_95 * math.sqrt(fraction * (1 - fraction) / n + Z_95**2 / (4 * n**2))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


def effective_size(successes: np.ndarray, trials: np.ndarray) -> float | None:
    """How many independent trials tell as much about a fraction as these trials, which come in clusters.

    Trials of one cluster (the pairs of a ranking, say) are correlated; clusters are taken to be independent. The size
    is n = p(1-p) / v, at least 1 and at most the number of trials, with p = Σs / Σt and v the linearised variance of
    this ratio over clusters, c/(c-1) · Σ(s - p·t)² / (Σt)² (Korn and Graubard 1998, Survey Methodology 24, 193-201).

    Args:
        successes, trials: (clusters,) s and t of each cluster. Halves are allowed; every t is above 0.

    Returns:
        None where v is 0 or there are fewer than two clusters.
    """
    clusters, total = len(trials), int(trials.sum())
    if clusters < 2:
        return None
    fraction = float(successes.sum()) / total
    variance = float(((successes - fraction * trials) ** 2).sum()) * clusters / (clusters - 1) / total**2
    return min(max(fraction * (1 - fraction) / variance, 1.0), total) if variance > 0 else None


def fraction_interval(successes: np.ndarray, trials: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of a fraction: Wilson's, with the effective size of trials that come in clusters.

    Unlike a bootstrap over clusters it needs no seed, and it keeps a width for few clusters or a fraction of 1: where
    the variance between clusters is 0 or undefined, the number of clusters is used as the sample size.

    Args:
        successes, trials: (clusters,) of each cluster, as in `effective_size`.

    Returns:
        (low, high), or None without trials.
    """
    total = int(trials.sum())
    if total == 0:
        return None
    return wilson(float(successes.sum()) / total, effective_size(successes, trials) or len(trials))


def percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the replicates of a bootstrap, a vector."""
    low, high = np.quantile(replicates, [0.025, 0.975])
    return float(low), float(high)


def resampled_sums(values: np.ndarray, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    """Column sums of bootstrap replicates (Efron 1979): as many rows as there are, drawn with replacement.

    Args:
        values: (rows, columns), a row per prompt, so that whole prompts are resampled.

    Returns:
        (replicates, columns).
    """
    # scipy.stats.bootstrap takes as long (75 ms for 9,000 prompts), but its bounds are NaN if one replicate is NaN.
    generator = np.random.default_rng(seed)
    rows = len(values)
    sums = np.empty((replicates, values.shape[1]))
    for index in range(replicates):
        sums[index] = np.bincount(generator.integers(0, rows, rows), minlength=rows) @ values
    return sums
