"""Config of the gold reward and of the guard, which are parts of PPO's config."""

from __future__ import annotations

from typing import Annotated

from pydantic import PositiveInt

from rlhf.config.base import Strict
from rlhf.core.table import Pick
from rlhf.guard.actions import ACTIONS
from rlhf.guard.rules import RULES
from rlhf.reward.sources import REWARDS

DEFAULT_RULES = tuple(RULES.pick(row.name) for row in RULES)


class GoldConfig(Strict):
    reward: Annotated[Pick, REWARDS]
    """What the policy is judged by but never trained on: a row of the table of reward sources with its options."""
    every: PositiveInt = 1
    """Updates between those whose rollout is also scored by the gold reward. Evaluations always are."""


class GuardConfig(Strict):
    watch: Annotated[Pick, REWARDS] | None = None
    """A reward source that scores every rollout without entering the loss: an ensemble, for its disagreement, or
    another reward model."""
    rules: tuple[Annotated[Pick, RULES], ...] = DEFAULT_RULES
    """What to watch for: rows of the table of guard rules. Rules that need what the run does not have stay silent.
    An empty list turns the guard off."""
    action: Annotated[Pick, ACTIONS] = ACTIONS.pick("warn")
    """What happens when a rule speaks: a row of the table of guard actions."""
    actions: dict[str, Annotated[Pick, ACTIONS]] = {}
    """Other actions for single rules, by the name of the rule."""
    baseline: PositiveInt = 5
    """Updates at the start whose mean later ones are compared with."""
    window: PositiveInt = 3
    """The last updates whose mean is compared."""
    patience: PositiveInt = 3
    """Updates in a row for which a rule must hold before it speaks."""
    cooldown: PositiveInt = 10
    """Updates after which a rule that still holds acts again, with `raise-kl` and `lower-lr`."""
