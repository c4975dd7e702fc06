"""Calibration of score differences as probabilities: reliability, and the temperature that refits it."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from rlhf.core.intervals import percentile_interval
from rlhf.evaluation.estimates import fraction
from rlhf.evaluation.scored import RecordPairs
from rlhf.reward.metrics import calibration_error, confidence_bins

BINS = 10
REPLICATES = 200
LARGEST = 100.0
"""Temperatures are sought from 1 / LARGEST to LARGEST."""


def calibration(pairs: RecordPairs, seed: int = 0) -> dict[str, Any]:
    """How well sigmoid(score difference) is the probability that a candidate is the better one.

    The temperature T divides the scores (Guo et al. 2017, arXiv:1706.04599, section 4.2). It minimises the log loss of
    a random half of the prompts, and log loss and calibration error are reported on the other half.

    Args:
        pairs: At least one pair.
        seed: Of the division of the prompts and of the bootstrap.

    Returns:
        `log_loss` (nats) and `error` (expected calibration error, see `rlhf.reward.metrics.calibration_error`) over all
        pairs; `reliability`, see there; and `refit` (None with fewer than four prompts): `temperature` with `low` and
        `high` (95%, percentiles of a bootstrap of the prompts), `fitted_on` (pairs), and for the other half `pairs`,
        `log_loss_before`, `log_loss_after`, `error_before`, `error_after`.
    """
    facts: dict[str, Any] = {"log_loss": log_loss(pairs.gap), "error": calibration_error(pairs.gap, BINS)}
    facts |= {"reliability": reliability(pairs), "refit": None}
    prompts = np.unique(pairs.prompt)
    if len(prompts) < 4:
        return facts
    half = np.random.default_rng(seed).permutation(prompts)[: len(prompts) // 2]
    fit = np.isin(pairs.prompt, half)
    low, high = _interval(pairs.where(fit), seed)
    temperature, other = fit_temperature(pairs.gap[fit]), pairs.gap[~fit]
    facts["refit"] = {
        "temperature": temperature, "low": low, "high": high, "fitted_on": int(fit.sum()), "pairs": len(other),
        "log_loss_before": log_loss(other), "log_loss_after": log_loss(other / temperature),
        "error_before": calibration_error(other, BINS), "error_after": calibration_error(other / temperature, BINS),
    }  # fmt: skip
    return facts


def log_loss(gap: np.ndarray) -> float:
    """Mean of -log sigmoid(gap), nats; 0.693 for guesses."""
    return float(np.logaddexp(0, -gap).mean())


def fit_temperature(gap: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The T that minimises the mean of -log sigmoid(gap / T), from 1/100 to 100.

    Args:
        gap: float [P], score of the better minus that of the worse candidate.
        weights: float [P], how often each pair counts.
    """

    def loss(log_temperature: float) -> float:
        return float(np.average(np.logaddexp(0, -gap / np.exp(log_temperature)), weights=weights))

    bound = np.log(LARGEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-5}).x))


def _interval(pairs: RecordPairs, seed: int) -> tuple[float, float]:
    """95% percentile interval of the temperature over bootstrap replicates of the prompts (Efron 1979)."""
    _, prompt = np.unique(pairs.prompt, return_inverse=True)
    generator, count = np.random.default_rng(seed), int(prompt.max()) + 1
    found = []
    for _ in range(REPLICATES):
        drawn = np.bincount(generator.integers(0, count, count), minlength=count)
        found.append(fit_temperature(pairs.gap, drawn[prompt]))
    return percentile_interval(np.array(found))


def reliability(pairs: RecordPairs) -> list[dict[str, Any]]:
    """The pairs in ten equal bins of confidence sigmoid(|gap|), from 0.5 to 1; empty bins are left out.

    Returns:
        For each bin `from` and `to`, the mean `confidence`, and the accuracy as `fraction` gives it.
    """
    confidence, index = confidence_bins(pairs.gap, BINS)
    return [
        {
            "from": 0.5 + place / (2 * BINS), "to": 0.5 + (place + 1) / (2 * BINS),
            "confidence": float(confidence[index == place].mean()),
            **fraction(pairs.correct[index == place], pairs.prompt[index == place]),
        }
        for place in np.unique(index).tolist()
    ]  # fmt: skip
