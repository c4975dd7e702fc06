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
class ActionEffect:
    """What an action changes from the next update on."""

    kl: float = 1.0
    """The KL coefficient is multiplied by this."""
    lr: float = 1.0
    """The learning rates are multiplied by this."""
    end: Literal["last", "best"] | None = None
    """The run ends, with this policy as its result."""


@ACTIONS.row("warn", again=False)
def warn() -> ActionEffect:
    """Print a warning and note it in events.jsonl."""
    return ActionEffect()


@ACTIONS.row("raise-kl", again=True)
def raise_kl(*, factor: AboveOne = 2.0) -> ActionEffect:
    """Multiply the KL coefficient, each time the rule fires.

    With the `adaptive` controller this multiplies what the controller sets.
    """
    return ActionEffect(kl=factor)


@ACTIONS.row("lower-lr", again=True)
def lower_lr(*, factor: BelowOne = 0.5) -> ActionEffect:
    """Multiply the learning rates of policy and critic, each time the rule fires."""
    return ActionEffect(lr=factor)


@ACTIONS.row("stop", again=False)
def stop() -> ActionEffect:
    """End the run. Its result is the current policy."""
    return ActionEffect(end="last")


@ACTIONS.row("best-checkpoint", again=False)
def best_checkpoint() -> ActionEffect:
    """End the run. Its result is the policy of the best checkpoint.

    With `gold` that is the one with the highest gold reward (mean of the updates before it), else the newest one that
    was written while no rule held.
    """
    return ActionEffect(end="best")
