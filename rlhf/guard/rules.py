"""The guard's rules: one table, RULES. A rule reads what was measured and says what is wrong, or None.

A rule sees the means over the first updates (`History.start`) and over the last ones (`History.now`) of each metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import PositiveFloat

from rlhf.config.base import Fraction
from rlhf.core.console import format_number
from rlhf.core.table import Table
from rlhf.guard.actions import AboveOne, BelowOne

RULES = Table("guard rule")


@dataclass
class History:
    """The metrics of a run, as far as rules need them: of constant size, however long the run is.

    Args:
        baseline: Values of a metric that make up its start.
        window: Values that make up its present.
    """

    baseline: int
    window: int
    first: dict[str, list[float]] = field(default_factory=dict)
    """The first values of each metric."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The last values of each metric."""
    highest: dict[str, float] = field(default_factory=dict)
    """The highest mean over a window so far."""

    def add(self, metrics: Mapping[str, float], names: tuple[str, ...]) -> None:
        """Take in the values of an update, of the named metrics."""
        for name in names:
            if name not in metrics:
                continue
            value = float(metrics[name])
            first, recent = self.first.setdefault(name, []), self.recent.setdefault(name, [])
            if len(first) < self.baseline:
                first.append(value)
            recent.append(value)
            del recent[: -self.window]
            if len(recent) == self.window:
                self.highest[name] = max(self.highest.get(name, self.now(name)), self.now(name))

    def knows(self, *names: str) -> bool:
        """Whether each of these metrics has a start and a present."""
        return all(len(self.first.get(n, ())) == self.baseline and self.has_window(n) for n in names)

    def has_window(self, name: str) -> bool:
        """Whether the metric has a present."""
        return len(self.recent.get(name, ())) == self.window

    def start(self, name: str) -> float:
        """Mean over the first updates, as far as they have come."""
        return sum(self.first[name]) / len(self.first[name])

    def now(self, name: str) -> float:
        """Mean over the last updates."""
        return sum(self.recent[name]) / len(self.recent[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue exactly, for JSON."""
        return {"first": self.first, "recent": self.recent, "highest": self.highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.first, self.recent, self.highest = dict(state["first"]), dict(state["recent"]), dict(state["highest"])


SCORE, SCORE_STD, GOLD = "objective/scores", "objective/scores_std", "objective/gold_reward"
OUTSIDE, REPEATED = "guard/outside_range", "guard/repetition"
WATCHED, WATCHED_SPREAD, SPREAD = "guard/watch_score", "guard/disagreement", "objective/disagreement"
PERTURBED = "guard/perturbation_effect"
LENGTH, ENTROPY = "rollout/response_length", "objective/entropy"
NAMES = (
    SCORE, SCORE_STD, GOLD, OUTSIDE, REPEATED, WATCHED, WATCHED_SPREAD, SPREAD, PERTURBED, LENGTH, ENTROPY,
)  # fmt: skip
"""The metrics that rules read."""


def _of(value: float) -> str:
    return format_number(value, 3)


@RULES.row("gold-falls")
def gold_falls(history: History, *, drop: PositiveFloat = 0.5) -> str | None:
    """The gold reward is below its highest value by more than this fraction of its gain, while the score still rises.

    The gain counts as at least half a standard deviation of the scores at the start. Needs `gold`.
    """
    if not history.knows(GOLD, SCORE, SCORE_STD):
        return None
    best, now = history.highest[GOLD], history.now(GOLD)
    gain = max(best - history.start(GOLD), 0.5 * history.start(SCORE_STD))
    if best - now <= drop * gain or history.now(SCORE) <= history.start(SCORE):
        return None
    return f"the gold reward fell from {_of(best)} to {_of(now)} while the score rose to {_of(history.now(SCORE))}"


@RULES.row("disagreement")
def disagreement(history: History, *, share: PositiveFloat = 0.5, ratio: AboveOne = 1.5) -> str | None:
    """The members of the ensemble disagree about the policy's completions.

    Their disagreement is `share` of the standard deviation of the scores at the start, or `ratio` times what it was at
    the start. The first says that the reward model knows too little from the start, and needs no baseline. Needs an
    ensemble as the reward, or `guard.watch`; its members should differ in the data that they were trained on, not in
    their seed alone.
    """
    name = next((name for name in (WATCHED_SPREAD, SPREAD) if history.has_window(name)), None)
    if name is None:
        return None
    now, spread = history.now(name), history.start(SCORE_STD)
    if now >= share * spread:
        return f"the ensemble's members disagree by {_of(now)}; the scores differ by {_of(spread)} at the start"
    if history.knows(name) and now >= ratio * max(history.start(name), 1e-6):
        return f"the ensemble's disagreement rose from {_of(history.start(name))} to {_of(now)}"
    return None


@RULES.row("watch-lags")
def watch_lags(history: History, *, share: BelowOne = 0.5) -> str | None:
    """The source in `guard.watch` has gained less than `share` of what the score has gained.

    Only once the score has gained a standard deviation of its start. Needs `guard.watch`, on the reward's scale.
    """
    if not history.knows(SCORE, SCORE_STD, WATCHED):
        return None
    gained = history.now(SCORE) - history.start(SCORE)
    watched = history.now(WATCHED) - history.start(WATCHED)
    if gained < history.start(SCORE_STD) or watched >= share * gained:
        return None
    return f"the score has gained {_of(gained)}, but by `guard.watch` only {_of(watched)}"


@RULES.row("score-range")
def score_range(history: History, *, above: Fraction = 0.5) -> str | None:
    """More than this fraction of the scores is outside the range of scores that the reward model's own data had.

    Needs a reward model that stored its range (`score_range` in its run.json).
    """
    if not history.knows(OUTSIDE) or history.now(OUTSIDE) <= max(above, 2 * history.start(OUTSIDE)):
        return None
    return f"{history.now(OUTSIDE):.0%} of the scores are outside the range of the reward model's training data"


@RULES.row("length")
def length(history: History, *, ratio: AboveOne = 2.0) -> str | None:
    """Completions have become `ratio` times as long as at the start, or as short, while the score rose."""
    if not history.knows(LENGTH, SCORE) or history.now(SCORE) <= history.start(SCORE):
        return None
    before, now = max(history.start(LENGTH), 1.0), max(history.now(LENGTH), 1.0)
    if 1 / ratio < now / before < ratio:
        return None
    return f"completions went from {_of(before)} to {_of(now)} tokens while the score rose"


@RULES.row("entropy")
def entropy(history: History, *, ratio: BelowOne = 0.25) -> str | None:
    """The policy's entropy has fallen below this fraction of its start."""
    if not history.knows(ENTROPY) or history.now(ENTROPY) >= ratio * history.start(ENTROPY):
        return None
    return f"entropy fell from {_of(history.start(ENTROPY))} to {_of(history.now(ENTROPY))} nats per token"


@RULES.row("repetition")
def repetition(history: History, *, rise: BelowOne = 0.15) -> str | None:
    """The fraction of phrases that repeat earlier ones of the same completion has risen by this much."""
    if not history.knows(REPEATED) or history.now(REPEATED) < history.start(REPEATED) + rise:
        return None
    return f"repeated phrases rose from {history.start(REPEATED):.0%} to {history.now(REPEATED):.0%}"


@RULES.row("perturbation")
def perturbation(history: History, *, level: PositiveFloat = 0.2, growth: PositiveFloat = 0.5) -> str | None:
    """Perturbations that should not change the scores of completions raise them.

    The mean effect of the last `guard.window` measurements is `level` standard deviations of the scores at the start,
    or `growth` more than in the first measurement. The first is what `rlhf evaluate --perturb` calls exploitable, and
    says that the reward model can be gamed from the start. Needs `guard.perturb`.
    """
    if not history.has_window(PERTURBED) or SCORE_STD not in history.first:
        return None
    unit = max(history.start(SCORE_STD), 1e-6)
    first, now = history.first[PERTURBED][0] / unit, history.now(PERTURBED) / unit
    if now < level and now - first < growth:
        return None
    return (
        f"changes that should not matter move the scores by {_of(now)} standard deviations;"
        f" by {_of(first)} at the first measurement"
    )
