"""Config of the reward-model stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import NonNegativeFloat

from rlhf.config.base import DataConfig, Paths, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.reward.losses import RANKING_LOSSES
from rlhf.tuning.methods import TUNING, Tuning


class RankingDataConfig(DataConfig):
    weights: Literal["use", "ignore"] = "use"
    """Whether the `weight` of a ranking multiplies its loss, in training and in the held-out loss: a ranking of weight
    2 counts as two. (For an aggregated ranking, the weight is its confidence.) Accuracy and the other metrics ignore
    weights."""


class RewardDataConfig(RankingDataConfig):
    demonstrations: Paths = []
    """Datasets of demonstrations for `normalize: demonstrations`, which shifts their mean score to 0."""


class RewardConfig(SupervisedConfig):
    data: RewardDataConfig
    """Datasets of rankings."""
    tuning: Tuning = TUNING.pick("full")
    """Which weights to train besides the score head: a row of the tuning table with its options."""
    loss: Annotated[Pick, RANKING_LOSSES] = RANKING_LOSSES.pick("bradley-terry")
    """The training loss: a row of the table of ranking losses with its options."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of a penalty that keeps scores near zero: the mean of (s_i + s_j)^2 over the pairs of a ranking."""
    shared_prompts: bool = True
    """Encode a prompt once for several of its candidates, if the model supports it and it is less work. Scores and
    gradients are the same."""
    normalize: Literal["none", "demonstrations", "completions"] = "completions"
    """How scores are normalised after training. `demonstrations` shifts the mean over `data.demonstrations` to 0
    (InstructGPT). `completions` shifts and scales to mean 0 and standard deviation 1 over the held-out candidates, or
    over the training candidates if nothing is held out."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if (self.normalize == "demonstrations") != bool(self.data.demonstrations):
            yield "data.demonstrations: name datasets exactly when `normalize: demonstrations` is set"
