"""The guard of a PPO run: takes in the metrics of each update, and says which rules fire, with which effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.guard.config import GuardConfig
from rlhf.guard.rules import GOLD, NAMES, History


@dataclass(frozen=True)
class Alarm:
    """A rule has fired."""

    step: int
    rule: str
    what: str
    """What was seen, with its values."""
    since: int
    """The first update of those in a row at which the rule held."""
    action: str

    def as_event(self) -> dict[str, Any]:
        """For events.jsonl."""
        return {"event": "guard", **asdict(self)}


class Guard:
    """Watches a run by its rules. It depends on metrics that are the same on every rank, so all ranks act the same.

    Args:
        config: Rules, actions and windows.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.history = History(config.baseline, config.window)
        self.since: dict[str, int] = {}
        """Rule -> the first update of those in a row, up to now, at which it held."""
        self.fired: dict[str, int] = {}
        """Rule -> the update at which it last fired."""
        self.kl_factor = self.lr_factor = 1.0
        self.end: Alarm | None = None
        """The alarm that ends the run."""
        self.best: int | None = None
        """The step of the best checkpoint so far."""
        self.best_gold: float | None = None
        """Its gold reward, mean of the last updates before it; None without one."""

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of update `step`, counted from 1; gives the rules that fire now, and applies them."""
        self.history.add(metrics, NAMES)
        alarms = []
        for rule in self.config.rules:
            what = rule(self.history)
            if what is None:
                self.since.pop(rule.name, None)
                continue
            since = self.since.setdefault(rule.name, step)
            action = self.config.actions.get(rule.name, self.config.action)
            since_last = step - self.fired[rule.name] if rule.name in self.fired else None
            may_fire = since_last is None or (action.row.traits["again"] and since_last >= self.config.cooldown)
            if step - since + 1 < self.config.patience or not may_fire:
                continue
            self.fired[rule.name] = step
            alarm = Alarm(step, rule.name, what, since, action.name)
            alarms.append(alarm)
            change = action()
            self.kl_factor *= change.kl
            self.lr_factor *= change.lr
            if change.end is not None and self.end is None:
                self.end = alarm
        return alarms

    def note_checkpoint(self, step: int) -> int | None:
        """Take in that a checkpoint of update `step` is written now; gives the step of the best one so far.

        With a gold reward that is the one with the highest; without, the newest that was written while no rule held.
        """
        if GOLD in self.history.recent:
            now = self.history.now(GOLD)
            if self.best_gold is None or now > self.best_gold:
                self.best, self.best_gold = step, now
        elif not self.since:
            self.best = step
        return self.best

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue exactly, for JSON."""
        return {
            "history": self.history.state_dict(), "since": self.since, "fired": self.fired,
            "kl_factor": self.kl_factor, "lr_factor": self.lr_factor, "end": asdict(self.end) if self.end else None,
            "best": self.best, "best_gold": self.best_gold,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.history.load_state_dict(state["history"])
        self.since, self.fired = dict(state["since"]), dict(state.get("fired", state.get("spoke", {})))
        self.kl_factor, self.lr_factor = float(state["kl_factor"]), float(state["lr_factor"])
        self.end = Alarm(**state["end"]) if state["end"] else None
        self.best, self.best_gold = state["best"], state["best_gold"]
