"""What an exporter reads and returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.base import ModelConfig
from rlhf.data.chat import ChatTokenizer


@dataclass(frozen=True)
class Source:
    """A finished run that is exported."""

    run: Path
    stage: str
    """sft, reward or ppo; `critic` for the critic of a PPO run."""
    model: Path
    config: ModelConfig
    chat: ChatTokenizer


@dataclass(frozen=True)
class Exported:
    """What an exporter has written."""

    dtype: str
    parameters: int
    stop_ids: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of a reward model's raw scores."""
    folded: bool = False
    """Whether the weights include the scale."""
    adapter_base: str | None = None


def base_of(adapter: Path) -> str:
    """The model that a PEFT adapter was trained on."""
    return str(json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
