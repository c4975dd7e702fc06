"""The metrics that say how good a run is."""

from __future__ import annotations

from typing import Any

from rlhf.doctor.evidence import Evidence
from rlhf.runs.logged import as_number

HEADLINES = {
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/log_loss"),
    "dpo": ("eval/accuracy", "eval/log_loss"),
    "ppo": ("eval/scores", "eval/kl"),
    "specialist": ("eval/accuracy", "eval/f1", "eval/loss"),
}
"""The metrics that say how good a run is, by stage; see docs/metrics.md."""


def headline(run: Evidence) -> dict[str, float]:
    """The metrics that say how good a run is, by name; of a PPO run also the score at its start.

    Those of a complete run's result, as run.json keeps them, which may be of an earlier step than the last one; else
    the newest that were logged.
    """
    kept = run.info.get("metrics") if run.state == "complete" else None
    found = {}
    for name in HEADLINES.get(run.stage, ()):
        value = _kept(kept, name)
        if value is not None:
            found[name] = value
        elif len(run[name]):
            found[name] = run[name].values[-1]
    if "eval/scores" in found:
        start = _kept(kept, "eval/scores_at_start")
        found["eval/scores_at_start"] = run["eval/scores"].values[0] if start is None else start
    return found


def _kept(metrics: Any, name: str) -> float | None:
    """A number of run.json's metrics, which the reward stage, DPO and specialists write without `eval/`."""
    if not isinstance(metrics, dict):
        return None
    return as_number(metrics.get(name, metrics.get(name.removeprefix("eval/"))))
