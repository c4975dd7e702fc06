"""Best-of-n: what the highest scored of n answers is worth, and how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.core.intervals import resampled_sums


@dataclass(frozen=True)
class BestOf:
    """A point of the curve."""

    n: int
    kl: float
    """Nats per completion between best-of-n and the policy."""
    score: float
    """Expected score of the best of n answers, mean over prompts."""
    low: float
    high: float
    """95% interval over prompts (percentile bootstrap)."""


def best_of_kl(n: int) -> float:
    """KL divergence of best-of-n from the policy that it samples from: log n - (n - 1) / n nats per completion.

    Exact where no two answers have the same score, else an upper bound (Beirami 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: NDArray[Any], n: int) -> NDArray[Any]:
    """The expected highest score of n answers, estimated without bias from all N answers of each prompt.

    The i-th smallest of N scores is the highest of a random subset of size n with probability
    C(i - 1, n - 1) / C(N, n) (Nakano 2021, arXiv:2112.09332, appendix I).

    Args:
        scores: float [prompts, N].
        n: From 1 to N.

    Returns:
        float [prompts].

    Raises:
        ValueError: n is not from 1 to N.
    """
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be from 1 to the {count} answers of each prompt, got {n}")
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    return np.sort(scores, axis=1) @ weights


def best_of_curve(scores: Sequence[Sequence[float]]) -> list[BestOf]:
    """The curve for n = 1, 2, 4, ... and N, from the scores of N answers to each prompt."""
    values = np.asarray(scores, dtype=float)
    count = values.shape[1]
    sizes = sorted({2**k for k in range(count.bit_length()) if 2**k <= count} | {count})
    expected = np.stack([expected_best(values, n) for n in sizes], axis=1)
    replicates = resampled_sums(expected) / len(expected)
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    means = expected.mean(axis=0)
    return [BestOf(n, best_of_kl(n), *map(float, point)) for n, *point in zip(sizes, means, low, high)]
