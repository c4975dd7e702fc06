"""Config of the DPO stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import NonNegativeFloat, PositiveFloat

from rlhf.config.base import OptimizerConfig, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.reward.config import RankingDataConfig
from rlhf.reward.losses import RANKING_LOSSES
from rlhf.tuning.methods import TUNING, Tuning


class DPOOptimizerConfig(OptimizerConfig):
    lr: PositiveFloat = 1e-6
    """Peak learning rate. Full fine-tuning of models of a billion weights and more takes 5e-7 to 1e-6, LoRA about 1e-5,
    tiny models much more."""


class DPOConfig(SupervisedConfig):
    data: RankingDataConfig
    """Datasets of rankings."""
    tuning: Tuning = TUNING.pick("full")
    """Which weights to train: a row of the tuning table with its options."""
    loss: Annotated[Pick, RANKING_LOSSES] = RANKING_LOSSES.pick("bradley-terry")
    """The training loss on implicit rewards: a row of the table of ranking losses with its options. On binary
    comparisons `bradley-terry` and `plackett-luce` are the loss of the DPO paper."""
    beta: PositiveFloat = 0.1
    """Strength of the KL constraint to the reference: the implicit reward of an answer is beta x (its log-prob - its
    log-prob under the reference). Smaller values let the policy move further for the same preference."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of the SFT loss on the best answer of each ranking, in nats per token, added to the ranking loss (TRL's
    `rpo_alpha`). It keeps the log-probs of good answers from falling."""
    shared_prompts: bool = True
    """Encode a prompt once for several of its answers, if the model supports it and it is less work. Log-probs and
    gradients are the same."""
    optimizer: DPOOptimizerConfig = DPOOptimizerConfig()
