"""Metrics of healthy runs, for the doctor."""

from __future__ import annotations

STEPS = 20


def line(first, last):
    """A straight line over the steps."""
    return [first + (last - first) * step / (STEPS - 1) for step in range(STEPS)]


HEALTHY = {
    "ppo": {
        "objective/scores": line(0.1, 2.0),
        "objective/scores_std": line(1.0, 0.8),
        "objective/kl": line(0.0, 6.0),
        "objective/kl_k3": line(0.0, 7.0),
        "objective/entropy": line(2.0, 1.2),
        "rollout/response_length": line(30, 35),
        "rollout/eos_rate": line(0.9, 0.95),
        "policy/approx_kl": line(0.01, 0.001),
        "policy/clipfrac": line(0.08, 0.01),
        "policy/ratio_min": line(0.5, 0.8),
        "policy/ratio_max": line(1.9, 1.3),
        "objective/advantages_mean": line(0.0, 0.0),
        "objective/advantages_std": line(1.0, 1.0),
        "optimizer/lr": line(1e-6, 5e-8),
        "optimizer/steps": line(16, 16),
        "policy/first_ratio_min": line(1.0, 1.0),
        "policy/first_ratio_max": line(1.0, 1.0),
        "val/explained_variance": line(-0.5, 0.6),
        "val/clipfrac": line(0.3, 0.1),
        "optimizer/grad_norm": line(2.0, 1.0),
        "memory/peak_gb": line(1.0, 1.05),
        "time/learn": line(1.0, 1.2),
    },
    "sft": {
        "train/loss": line(3.0, 1.5),
        "eval/loss": line(3.0, 1.7),
        "optimizer/grad_norm": line(2.0, 1.0),
    },
    "reward": {
        "train/loss": line(1.5, 0.9),
        "eval/loss": line(1.5, 1.0),
        "eval/accuracy": line(0.5, 0.72),
        "eval/log_loss": line(0.69, 0.58),
        "eval/ceiling": line(0.8, 0.8),
        "optimizer/grad_norm": line(2.0, 1.0),
    },
}


def names(found):
    return [finding.name for finding in found]
