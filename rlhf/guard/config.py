"""Config of the gold reward and of the guard, which are parts of PPO's config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, field_validator

from rlhf.config.base import Strict
from rlhf.core.table import Pick
from rlhf.guard.actions import ACTIONS
from rlhf.guard.rules import RULES
from rlhf.reward.perturbations import PERTURBATIONS
from rlhf.reward.sources import REWARDS

DEFAULT_RULES = tuple(RULES.pick(row.name) for row in RULES)


class GoldConfig(Strict):
    reward: Annotated[Pick, REWARDS]
    """The reward that is not trained on: a row of the table of reward sources with its options."""
    every: PositiveInt = 1
    """The gold reward scores the rollout of every this many updates, and all evaluations."""


class PerturbConfig(Strict):
    every: PositiveInt = 5
    """Perturb and score again the completions of every this many updates."""
    answers: PositiveInt = 32
    """How many completions: the first ones of the rollout that are not blank."""
    names: tuple[str, ...] = Field(("markdown", "self-praise", "repetition", "filler"), min_length=1)
    """Which perturbations of `rlhf evaluate --perturb`, of those that should not change a score."""

    @field_validator("names")
    @classmethod
    def _leave_the_score(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if PERTURBATIONS[name].traits["expected"] != "same":
                same = ", ".join(row.name for row in PERTURBATIONS if row.traits["expected"] == "same")
                raise ValueError(f"{name!r} should lower a score; those that should leave it as it is: {same}")
        if len(set(names)) < len(names):
            raise ValueError("a perturbation is named twice")
        return names


class GuardConfig(Strict):
    watch: Annotated[Pick, REWARDS] | None = None
    """A reward source that scores every rollout without entering the loss: an ensemble, for its disagreement, or
    another reward model."""
    perturb: PerturbConfig | None = None
    """Perturbations of completions that should not change their scores, for the rule `perturbation`. `{}` turns
    them on with these defaults. A measurement scores 32 completions five times; it enters neither loss nor
    advantages."""
    rules: tuple[Annotated[Pick, RULES], ...] = DEFAULT_RULES
    """What to watch for: rows of the table of guard rules. Rules that need what the run does not have never fire.
    An empty list turns the guard off."""
    action: Annotated[Pick, ACTIONS] = ACTIONS.pick("warn")
    """What happens when a rule fires: a row of the table of guard actions."""
    actions: dict[str, Annotated[Pick, ACTIONS]] = {}
    """Other actions for single rules, by the name of the rule."""
    baseline: PositiveInt = 5
    """Updates at the start whose mean later ones are compared with."""
    window: PositiveInt = 3
    """The last updates whose mean is compared."""
    patience: PositiveInt = 3
    """Updates in a row for which a rule must hold before it fires."""
    cooldown: PositiveInt = 10
    """Updates after which a rule that still holds acts again, with `raise-kl` and `lower-lr`."""
