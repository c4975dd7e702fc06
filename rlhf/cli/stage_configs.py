"""Stage name -> config class."""

from __future__ import annotations

from rlhf.config.base import StageConfig
from rlhf.dpo.config import DPOConfig
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig
from rlhf.specialist.config import SpecialistConfig

STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
}
"""The stages of a pipeline, in their order."""
TRAINING: dict[str, type[StageConfig]] = {**STAGES, "specialist": SpecialistConfig}
"""Every command that trains by a config."""
