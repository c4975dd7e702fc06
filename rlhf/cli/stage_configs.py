"""Stage name -> config class."""

from __future__ import annotations

from rlhf.config.base import StageConfig
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig
from rlhf.specialist.config import SpecialistConfig

STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
"""The three stages, in their order."""
TRAINING: dict[str, type[StageConfig]] = {**STAGES, "specialist": SpecialistConfig}
"""Every command that trains by a config."""
