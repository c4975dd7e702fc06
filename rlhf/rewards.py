"""Where PPO's scores come from: one table, REWARDS."""

from __future__ import annotations
from rlhf.table import Table

REWARDS = Table("reward source")


@REWARDS.row("model")
def model(*, path: str, retokenize: bool = False) -> None:
    """The trained reward model of a run."""
