"""What the guard does when a rule fires: one table, ACTIONS. A row says what changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlhf.core.table import Table

ACTIONS = Table("guard action")
AboveOne = Annotated[float, Field(gt=1)]
BelowOne = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Change:
    """What an action changes from the next update on."""

    kl: float = 1.0
    """The KL coefficient is multiplied by this."""
    lr: float = 1.0
    """The learning rates are multiplied by this."""
    end: Literal["last", "best"] | None = None
    """The run ends, with this policy as its result."""


@ACTIONS.row("warn", again=False)
def warn() -> Change:
    """Print a warning and note it in events.jsonl."""
    return Change()


@ACTIONS.row("raise-kl", again=True)
def raise_kl(*, factor: AboveOne = 2.0) -> Change:
    """Multiply the KL coefficient, each time the rule fires.

    With the `adaptive` controller this multiplies what the controller sets.
    """
    return Change(kl=factor)


@ACTIONS.row("lower-lr", again=True)
def lower_lr(*, factor: BelowOne = 0.5) -> Change:
    """Multiply the learning rates of policy and critic, each time the rule fires."""
    return Change(lr=factor)


@ACTIONS.row("stop", again=False)
def stop() -> Change:
    """End the run. Its result is the current policy."""
    return Change(end="last")


@ACTIONS.row("best-checkpoint", again=False)
def best_checkpoint() -> Change:
    """End the run. Its result is the policy of the best checkpoint.

    With `gold` that is the one with the highest gold reward (mean of the updates before it), else the newest one that
    was written while no rule held.
    """
    return Change(end="best")
