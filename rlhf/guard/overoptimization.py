"""How a gold reward rises and falls while a policy is optimised against a proxy: the forms of Gao et al. 2022.

arXiv:2210.10760, section 3: with d = sqrt(KL(policy || initial policy)), KL in nats per completion, the gold reward
above that of the initial policy is

    best-of-n:  R(d) = d (alpha - beta d)
    RL:         R(d) = d (alpha - beta log d)

Both are linear in alpha and beta, so they are fitted by least squares, with an intercept, since the initial policy's
gold reward is known only with noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["rl", "best-of-n"]
FEWEST = 5
"""Points that a fit needs."""
REPLICATES = 1000


@dataclass(frozen=True)
class Value:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurveFit:
    """A form fitted to a run's points."""

    form: Form
    start: Value
    """The gold reward of the initial policy."""
    alpha: Value
    beta: Value
    peak: Value
    """The d at which the form is highest; infinite where it does not fall."""
    peak_gold: Value
    """The gold reward there; infinite where it does not fall."""
    falls: float
    """The fraction of bootstrap replicates in which the form has a peak."""
    explained: float
    """The fraction of the points' variance that the form explains."""
    furthest: float
    """The largest d of the points. A peak beyond it is extrapolated."""

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """The form's gold reward at distances d >= 0."""
        return features(distance, self.form) @ np.array([self.start.value, self.alpha.value, self.beta.value])


def features(distance: np.ndarray, form: Form) -> np.ndarray:
    """The columns [1, d, -d log d] (RL) or [1, d, -d^2] (best-of-n): float [points, 3]. 0 log 0 is 0."""
    bend = distance * np.log(np.where(distance > 0, distance, 1.0)) if form == "rl" else distance**2
    return np.stack([np.ones_like(distance), distance, -bend], axis=1)


def peak_of(alpha: float, beta: float, form: Form) -> tuple[float, float]:
    """The d at which the form is highest, and its height above d = 0; both infinite if it never falls.

    RL: R'(d) = alpha - beta log d - beta = 0 at d = exp(alpha / beta - 1), where R = beta d.
    Best-of-n: R'(d) = alpha - 2 beta d = 0 at d = alpha / (2 beta), where R = alpha^2 / (4 beta). With alpha <= 0 the
    best-of-n form falls from the start: 0, 0.
    """
    if beta <= 0:
        return math.inf, math.inf
    if form == "rl":
        exponent = alpha / beta - 1
        best = math.exp(exponent) if exponent < 700 else math.inf
        return best, beta * best
    return max(0.0, alpha / (2 * beta)), max(0.0, alpha) ** 2 / (4 * beta)


def fit(distance: np.ndarray, gold: np.ndarray, form: Form = "rl") -> CurveFit | None:
    """Fit a form to the points of a run, with 95% intervals.

    The intervals are percentiles of a moving-block bootstrap (Künsch 1989): successive updates are correlated, so
    blocks of round(n^(1/3)) successive points are drawn with replacement.

    Args:
        distance: d = sqrt(KL) of each point, float [n], in the order of the updates.
        gold: The gold reward of each, float [n].

    Returns:
        None for fewer than 5 points, or where all distances are equal.
    """
    count = len(distance)
    if count < FEWEST or np.ptp(distance) == 0:
        return None
    columns = features(distance, form)
    best = np.linalg.lstsq(columns, gold, rcond=None)[0]
    block = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(0).integers(0, count - block + 1, (REPLICATES, math.ceil(count / block)))
    chosen = (starts[:, :, None] + np.arange(block)).reshape(REPLICATES, -1)[:, :count]
    found = np.array([np.linalg.lstsq(columns[rows], gold[rows], rcond=None)[0] for rows in chosen])
    peaks = np.array([peak_of(alpha, beta, form) for _, alpha, beta in found])
    place, height = peak_of(best[1], best[2], form)
    rest = gold - columns @ best
    spread = float(((gold - gold.mean()) ** 2).sum())
    start, alpha, beta = (_value(best[i], found[:, i]) for i in range(3))
    return CurveFit(
        form, start, alpha, beta,
        peak=_value(place, peaks[:, 0]),
        peak_gold=_value(best[0] + height, found[:, 0] + peaks[:, 1]),
        falls=float(np.isfinite(peaks[:, 0]).mean()),
        explained=1 - float((rest**2).sum()) / spread if spread > 0 else 0.0,
        furthest=float(distance.max()),
    )  # fmt: skip


def _value(value: float, replicates: np.ndarray) -> Value:
    # a quantile that is one of the values: between a number and infinity there is no other
    low, high = np.quantile(replicates, [0.025, 0.975], method="closest_observation")
    return Value(float(value), float(low), float(high))
