"""Short PPO runs of the tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from rlhf.config.load import check_config
from rlhf.ppo.config import PPOConfig

REWARD = {"name": "function", "function": "ppo_rewards:letters"}
SMALL = {
    "rollout__prompts_per_update": 4, "rollout__max_new_tokens": 6, "batch__epochs": 1, "batch__minibatches": 1,
    "eval__prompts": 1,
}  # fmt: skip
"""For tests of what does not depend on the size of an update."""


def config(folder: str | Path, prompts: str, **changes: Any) -> PPOConfig:
    """Two updates of 8 prompts; `rollout__top_p=0.9` changes `rollout.top_p`."""
    values: dict[str, Any] = {
        "run": str(folder),
        "model": {"path": tiny.llama()},
        "data": {"prompts": prompts, "max_prompt_tokens": 48},
        "reward": REWARD,
        "critic": {"init": "policy"},
        "updates": 2,
        "rollout": {"prompts_per_update": 8, "max_new_tokens": 12},
        "batch": {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 160},
        "optimizer": {"policy_lr": 1e-3, "critic_lr": 1e-3, "schedule": "constant"},
        "eval": {"every": 2, "prompts": 3},
        "checkpoints": {"every": 1},
    }
    return check_config(PPOConfig, with_changes(values, changes), "test")


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, changed where keys like `batch__epochs` say so."""
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        part = values
        for name in parents:
            part = part.setdefault(name, {})
        part[last] = value
    return values
