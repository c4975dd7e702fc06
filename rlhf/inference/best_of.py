"""Best-of-n: what the highest scored of n answers is worth, and how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.core.intervals import resampled_sums
from rlhf.runs.metrics import read_metrics


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


def best_odds(count: int, n: int) -> np.ndarray:
    """The probability of each of `count` scores, in ascending order, to be the highest of a random n of them:
    C(i - 1, n - 1) / C(count, n) for the i-th (Nakano 2021, arXiv:2112.09332, appendix I)."""
    return np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])


def expected_best(scores: np.ndarray, n: int) -> np.ndarray:
    """The expected highest score of n answers, estimated without bias from all N answers of each prompt.

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
    return np.sort(scores, axis=1) @ best_odds(count, n)


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


def evaluations_of(run: str) -> list[tuple[float, float]]:
    """KL in nats per completion and mean score of each evaluation of a PPO run, in order. A negative estimate of the
    KL counts as 0.

    Raises:
        UserError: It is no run, or has no evaluations.
    """
    metrics = read_metrics(run)
    if not {"eval/kl", "eval/scores"} <= set(metrics.columns):
        raise UserError(f"--with {run}: has no evaluations", remedy="Name a PPO run with `eval.prompts` above 0.")
    found = metrics[["eval/kl", "eval/scores"]].dropna()
    return [(max(0.0, float(kl)), float(score)) for kl, score in found.to_numpy()]


def write_curve(file: Path, curve: Sequence[BestOf], facts: Mapping[str, Any]) -> None:
    """Write the curve as JSON, for `rlhf report`: `best_of`, a list of points, and the facts.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_json(file, {"best_of": [asdict(point) for point in curve], **facts})
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None


def draw_curve(file: Path, curve: Sequence[BestOf], runs: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw the score of the best of n, and of PPO runs, against the square root of the KL (Gao et al. 2022,
    arXiv:2210.10760).

    Args:
        file: An .svg or .png file.
        curve: Of best-of-n.
        runs: Label -> what `evaluations_of` gives.

    Raises:
        UserError: It cannot be written.
    """
    from matplotlib import figure as mpl  # slow to import

    figure = mpl.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    distance = [math.sqrt(point.kl) for point in curve]
    axes.fill_between(distance, [p.low for p in curve], [p.high for p in curve], alpha=0.2, linewidth=0)
    axes.plot(distance, [point.score for point in curve], "o-", label="best of n")
    for x, point in zip(distance, curve):
        axes.annotate(
            str(point.n), (x, point.score), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=8
        )
    for label, points in runs.items():
        axes.plot([math.sqrt(kl) for kl, _ in points], [score for _, score in points], "s--", label=label)
    axes.set_xlabel("square root of the KL to the policy, nats per completion")
    axes.set_ylabel("mean score")
    axes.legend(frameon=False)
    try:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None
