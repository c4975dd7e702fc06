"""The metrics that say how good a run is."""

from __future__ import annotations

from rlhf.doctor.evidence import Evidence

HEADLINES = {
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/log_loss"),
    "dpo": ("eval/accuracy", "eval/log_loss"),
    "ppo": ("eval/scores", "eval/kl"),
    "specialist": ("eval/accuracy", "eval/f1", "eval/loss"),
}
"""The metrics that say how good a run is, by stage; see docs/metrics.md."""


def headline(run: Evidence) -> dict[str, float]:
    """The newest values of the metrics that say how good a run is; a PPO run's score at its start too."""
    found = {name: run[name].values[-1] for name in HEADLINES.get(run.stage, ()) if len(run[name])}
    if "eval/scores" in found:
        found["eval/scores_at_start"] = run["eval/scores"].values[0]
    return found
