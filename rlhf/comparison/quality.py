"""Which way is best, and how sure that is: paired resamples of the quality of ways over records and seeds.

All ways answer the same records, so differences are resampled record by record: the interval of a difference is much
narrower than those of the two values (Efron & Tibshirani 1993, chapter 8; Koehn 2004 for paired tests of systems).

A way that is trained with another seed, or shown other examples, gives another value. With several seeds a resample
also varies the mean over seeds, so that without variation over records its interval is Student's t interval of the
mean, which is wide for two or three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.core.intervals import percentile_interval, resampled_sums
from rlhf.tasks.metrics import MetricColumns

RESAMPLES = 2000


@dataclass(frozen=True)
class Quality:
    """A way's metric over the records, resampled."""

    value: float
    resampled: np.ndarray
    """The metric on each of the resamples; the resamples are the same for all ways. [RESAMPLES]"""
    by_seed: tuple[float, ...] = ()
    """The metric of each repetition with another seed; `value` is their mean."""
    limits: tuple[float, float] = (-math.inf, math.inf)
    """The least and the largest possible value."""

    @property
    def interval(self) -> tuple[float, float]:
        """95% percentile interval, within `limits`."""
        low, high = np.clip(percentile_interval(self.resampled), *self.limits)
        return float(low), float(high)


def quality(repeats: Sequence[MetricColumns], limits: tuple[float, float] = (-math.inf, math.inf)) -> Quality:
    """The metric over the records, and over resamples of records and seeds; means over repetitions with other seeds.

    Args:
        repeats: The metric's columns of the same records, one per repetition.
        limits: The least and the largest possible value.
    """
    values = np.array([float(one.statistic(one.values.sum(0, keepdims=True))[0]) for one in repeats])
    # the drawn records follow from their number and the seed alone, so they are the same for all ways
    drawn = np.mean([one.statistic(resampled_sums(one.values, RESAMPLES, 0)) for one in repeats], axis=0)
    return Quality(float(values.mean()), drawn + seed_weights(len(values)) @ values, tuple(values.tolist()), limits)


def seed_weights(seeds: int) -> np.ndarray:
    """Weights W, float64 [RESAMPLES, seeds], that make W @ values of each seed vary as the error of their mean does.

    For values with standard deviation s (of n - 1), W @ values is distributed as s / sqrt(n) * t with n - 1 degrees of
    freedom: (z - mean z) / sqrt(n (n - 1)) for normal z, divided by sqrt(chi² / (n - 1)) (Student 1908). The weights
    are the same for all ways, so seeds are paired as records are. Zeros for one seed, which says nothing about others.
    """
    if seeds == 1:
        return np.zeros((RESAMPLES, 1))
    draw = np.random.default_rng(1)
    normal = draw.standard_normal((RESAMPLES, seeds))
    scale = np.sqrt(draw.chisquare(seeds - 1, (RESAMPLES, 1)) / (seeds - 1))
    return (normal - normal.mean(1, keepdims=True)) / np.sqrt(seeds * (seeds - 1)) / scale


def difference(one: Quality, other: Quality) -> tuple[float, float, float]:
    """`one` minus `other`, and its paired 95% interval (low, high)."""
    return one.value - other.value, *percentile_interval(one.resampled - other.resampled)


@dataclass(frozen=True)
class Recommendation:
    """The way to take, and why."""

    way: str
    best: str
    """The way with the best value."""
    equals: list[str]
    """Ways that are not measurably worse than the best, itself included; the cheapest first."""
    confidence: float
    """Fraction of the resamples in which no way beats the recommended one by more than `margin`."""
    margin: float
    text: str


def recommend(found: Mapping[str, Quality], costs: Mapping[str, tuple[float, ...]], baseline: str) -> Recommendation:
    """Recommend the cheapest of the ways that are not measurably worse than the best.

    A way is measurably worse if the paired 95% interval of its difference to the best excludes zero. Cheaper is: fewer
    trained parameters, then fewer stored bytes, then less training time, then shorter prompts.

    Args:
        found: Way -> quality; all on the same records.
        costs: Way -> these four, in this order. Tokens of a prompt are the mean over requests, examples and virtual
            tokens included.
        baseline: The way that needs nothing, such as the untrained base with the plain prompt.
    """
    best = max(found, key=lambda way: found[way].value)
    as_good = [way for way in found if way == best or difference(found[way], found[best])[2] >= 0]
    equals = sorted(as_good, key=costs.__getitem__)
    chosen = equals[0]
    margin = abs(found[best].value - found[chosen].value)
    others = np.max([one.resampled for one in found.values()], axis=0)
    # ways within the difference that is accepted for the lower cost do not count against the recommendation
    confidence = float((found[chosen].resampled >= others - margin - 1e-12).mean())
    text = _words(found, chosen, best, equals, baseline)
    return Recommendation(chosen, best, equals, confidence, margin, f"{text} {_sure(confidence, margin)}")


def _words(found: Mapping[str, Quality], chosen: str, best: str, equals: Sequence[str], baseline: str) -> str:
    low, high = found[chosen].interval
    parts = [f"Take {chosen}: {found[chosen].value:.3f} ({low:.3f} to {high:.3f})."]
    if chosen != best:
        gap, gap_low, gap_high = difference(found[chosen], found[best])
        parts.append(
            f"{best} has the best value, {found[best].value:.3f}, but the difference of {gap:+.3f} "
            f"({gap_low:+.3f} to {gap_high:+.3f}) may be chance, and {chosen} costs less."
        )
    elif len(equals) == 1:
        parts.append("Every other way is measurably worse.")
    else:
        parts.append(f"It is also the cheapest of those that may be as good: {', '.join(equals)}.")
    if chosen != baseline and baseline in found:
        gap, gap_low, gap_high = difference(found[chosen], found[baseline])
        verdict = "better than" if gap_low > 0 else "not measurably better than"
        parts.append(f"It is {verdict} {baseline} ({gap:+.3f}; {gap_low:+.3f} to {gap_high:+.3f}).")
    return " ".join(parts)


def _sure(confidence: float, margin: float) -> str:
    within = f" by more than {margin:.3f}" if margin else ""
    how = "Sure" if confidence >= 0.95 else "Fairly sure" if confidence >= 0.8 else "Not sure"
    more = "" if confidence >= 0.8 else " Measure on more records, or with more seeds."
    return f"{how}: in {confidence:.0%} of the resamples no way beats it{within}.{more}"
