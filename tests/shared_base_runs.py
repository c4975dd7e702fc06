"""PPO runs whose four roles share one base, and the runs that they start from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import finished
import tiny
import torch
from ppo_runs import with_changes
from safetensors.torch import load_file

LORA = {"name": "lora", "rank": 4, "alpha": 8}
LAST = LORA | {"layers": 1}


@functools.cache
def parents() -> dict[str, str]:
    """SFT runs (full; LoRA), and LoRA reward runs over the first and over the base; `last` adapts the last layer."""
    folder = Path(tiny.llama()).with_name("shared-base-runs")
    made = {"sft": finished.sft(folder / "sft"), "sft-lora": finished.sft(folder / "sft-lora", tuning=LORA)}
    made["over-sft"] = finished.reward(folder / "over-sft", made["sft"], LORA)
    made["last"] = finished.reward(folder / "last", made["sft"], LAST)
    made["over-base"] = finished.reward(folder / "over-base", tuning=LORA)
    made["full"] = finished.reward(folder / "full", made["sft"])
    return made


def values_of(folder, prompts, model, reward, sharing="shared", tuning=LORA, **changes) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": str(folder),
        "model": {"path": model, "sharing": sharing},
        "data": {"prompts": prompts, "max_prompt_tokens": 48},
        "reward": {"name": "model", "path": reward} if isinstance(reward, str) else reward,
        "tuning": tuning,
        "critic": {"init": "reward" if isinstance(reward, str) else "policy", "tuning": tuning},
        "updates": 2,
        "rollout": {"prompts_per_update": 7, "max_new_tokens": 12, "stop": ["e", "a"]},
        "batch": {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 160},
        "optimizer": {"policy_lr": 1e-3, "critic_lr": 1e-3, "schedule": "constant", "eps": 1e-3},
        "eval": {"every": 2, "prompts": 3},
        "checkpoints": {"every": 1},
    }
    return with_changes(values, changes)


def adapters_of(folder) -> dict[str, torch.Tensor]:
    """The trained weights of policy and critic that a run has left."""
    return {
        f"{part}.{name}": weight
        for part in ("adapter", "critic")
        for name, weight in load_file(Path(folder) / part / "adapter_model.safetensors").items()
    }
