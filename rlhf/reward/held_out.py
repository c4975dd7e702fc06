"""Held-out rankings with their scores: the loss, what is logged, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlhf.core.console import is_main, say, table
from rlhf.core.files import write_json
from rlhf.reward.agreement import Agreement
from rlhf.reward.metrics import ScoredRanking, metric_rows, reward_metrics
from rlhf.runs.run import Run

HEADLINE = ("accuracy", "accuracy_interval", "longer_accuracy", "log_loss", "calibration_error", "pairs", "rankings")
"""The held-out metrics that go to run.json; all of them are in reward_metrics.json."""
LOSS_CHUNK = 256
"""Held-out rankings per batch of the loss."""


def mean_loss(rankings: int, losses: Callable[[int, int], tuple[Tensor, Tensor, Tensor]]) -> float:
    """Weighted mean loss of the rankings that can be compared.

    Args:
        rankings: Number of rankings.
        losses: (start, end) -> of the rankings start..end-1, the weighted losses [B], which of them can be compared
            [B] (bool), and the weights [B].
    """
    total = weight = 0.0
    for start in range(0, rankings, LOSS_CHUNK):
        found, counted, weights = losses(start, min(start + LOSS_CHUNK, rankings))
        total += float(found[counted].sum())
        weight += float(weights[counted].sum())
    return total / weight


@dataclass
class HeldOutScores:
    """The held-out rankings as they were scored in the evaluation with the lowest loss so far.

    Args:
        score: Scores them with the weights that the engine holds.
        human: Human agreement on them, if known.
    """

    score: Callable[[Any], list[ScoredRanking]]
    human: Agreement | None
    loss: float = float("inf")
    step: int = -1
    scored: list[ScoredRanking] = field(default_factory=list)

    def log(self, loss: float, step: int, scored: list[ScoredRanking], *more: str) -> dict[str, float]:
        """The metrics that every evaluation logs, and `more`, where they are defined; with human agreement's ceiling.

        The scores are kept if the loss is the lowest so far.
        """
        if loss < self.loss:
            self.loss, self.step, self.scored = loss, step, scored
        found = {"loss": loss, **reward_metrics(scored), **({"ceiling": self.human.ceiling} if self.human else {})}
        names = ("loss", "accuracy", "log_loss", "calibration_error", *more, "ceiling")
        return {name: found[name] for name in names if found.get(name) is not None}

    def report(self, run: Run, engine: Any, step: int) -> tuple[dict[str, Any], list[ScoredRanking]]:
        """Show the metrics at `step`, whose weights the engine has loaded, and write them to reward_metrics.json.

        Returns:
            The metrics for run.json, and the scores.
        """
        scored = self.scored if self.step == step else self.score(engine)
        ceiling = self.human.metrics() if self.human else {}
        metrics = reward_metrics(scored) | ceiling
        for part in metric_rows(metrics):
            table(*part)
        if self.human:
            say(self.human.compared_with(metrics["accuracy"]))
        if is_main():
            write_json(run.path / "reward_metrics.json", {"step": step, **metrics})
        return {name: metrics[name] for name in HEADLINE} | ceiling, scored
