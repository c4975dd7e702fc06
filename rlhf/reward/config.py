"""Config of the reward-model stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import NonNegativeFloat, model_validator

from rlhf.config.base import DataConfig, Paths, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.models.tuning import TUNING
from rlhf.reward.losses import RANKING_LOSSES


class RewardDataConfig(DataConfig):
    weights: Literal["use", "ignore"] = "use"
    """Whether a ranking's `weight` (its confidence, where it was aggregated) multiplies its loss: one of weight 2
    counts as two, in training and in the held-out loss. Accuracy and the other metrics ignore weights."""
    demonstrations: Paths = []
    """Datasets of demonstrations whose mean score becomes 0, for `normalize: demonstrations`."""


class RewardConfig(SupervisedConfig):
    data: RewardDataConfig
    """Datasets of rankings."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What is trained besides the score head: a row of the tuning table with its options."""
    loss: Annotated[Pick, RANKING_LOSSES] = RANKING_LOSSES.pick("bradley-terry")
    """A row of the table of ranking losses with its options."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of the penalty that keeps scores near zero."""
    shared_prompts: bool = True
    """Encode a prompt once for several of its completions, wherever the model can and it is less work; the scores and
    gradients are the same."""
    normalize: Literal["none", "demonstrations", "completions"] = "completions"
    """After training, scores are shifted and scaled: `demonstrations` puts the mean over `data.demonstrations` at 0
    (InstructGPT), `completions` gives mean 0 and standard deviation 1 over the held-out completions (the training
    completions where nothing is held out)."""

    renamed_keys: ClassVar[dict[str, str]] = SupervisedConfig.renamed_keys | {
        "centering": "center_rewards_coefficient",
        "reference": "data.demonstrations",
        "normalize: answers": "normalize: completions",
    }

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardConfig:
        faults = []
        if (self.normalize == "demonstrations") != bool(self.data.demonstrations):
            faults.append("data.demonstrations: name datasets exactly when `normalize: demonstrations` is set")
        if self.tuning.row.traits["prompt_learning"]:
            faults.append(f"tuning: {self.tuning.name!r} is for SFT alone: scores do not see virtual tokens")
        if faults:
            raise ValueError("; ".join(faults))
        return self
