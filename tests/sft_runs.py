"""Short runs of instruction tuning on the tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from logged import lines

from rlhf.config.load import check_config
from rlhf.sft.config import SFTConfig
from stages import sft


def settings(demos: str, run: Path, **changes: Any) -> dict[str, Any]:
    """Ten steps in two epochs, two micro-batches each; evaluations and checkpoints at different steps."""
    return {
        "run": str(run),
        "model": {"path": tiny.llama()},
        "data": {"train": [demos]},
        "batch": {"batch_size": 8, "micro_batch_size": 4, "epochs": 2},
        "optimizer": {"lr": 3e-3, "warmup": 0.1},
        "checkpoints": {"every": 3},
        "eval": {"every": 4, "samples": 2, "sample_tokens": 8},
        "timeout_seconds": 240,
        **changes,
    }


def run(values: dict[str, Any], resume: bool = False) -> Path:
    sft.run(check_config(SFTConfig, values, "the test"), resume=resume)
    return Path(values["run"])


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in lines(run) if "train/loss" in row]
