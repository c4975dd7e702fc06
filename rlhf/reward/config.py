"""Config of the reward-model stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from rlhf.config.base import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, Paths, Positive, StageConfig, Weight
from rlhf.core.table import Pick
from rlhf.models.tuning import TUNING
from rlhf.reward.losses import RANKING_LOSSES


class RewardDataConfig(DataConfig):
    weights: Literal["use", "ignore"] = "use"
    """Whether a ranking's `weight` (its confidence, where it was aggregated) multiplies its loss: one of weight 2
    counts as two, in training and in the held-out loss. Accuracy and the other figures know no weights."""


class RewardConfig(StageConfig):
    model: ModelConfig
    data: RewardDataConfig
    """Datasets of rankings."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What is trained besides the score head: a row of the tuning table with its options."""
    loss: Annotated[Pick, RANKING_LOSSES] = RANKING_LOSSES.pick("bradley-terry")
    """A row of the table of ranking losses with its options."""
    centering: Weight = 0.0
    """Weight of the penalty that keeps scores near zero."""
    shared_prompts: bool = True
    """Encode a prompt once for several of its answers, wherever the model can and it is less work; the scores and
    gradients are the same."""
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval_every: Positive = 100
    """Steps between evaluations on the held-out rankings; the checkpoint with the lowest loss becomes the result."""
    normalize: Literal["none", "demonstrations", "answers"] = "answers"
    """After training, scores are shifted and scaled: `demonstrations` puts the mean over `reference` demonstrations
    at 0 (InstructGPT), `answers` also scales to mean 0 and standard deviation 1 over the held-out answers (the
    training answers where nothing is held out)."""
    reference: Paths = []
    """Datasets of demonstrations for `normalize: demonstrations`."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardConfig:
        faults = []
        if (self.normalize == "demonstrations") != bool(self.reference):
            faults.append("reference: name demonstrations exactly when `normalize: demonstrations` is set")
        if self.tuning.row.traits["prompt_learning"]:
            faults.append(f"tuning: {self.tuning.name!r} is for SFT alone: scores do not see virtual tokens")
        if faults:
            raise ValueError("; ".join(faults))
        return self
