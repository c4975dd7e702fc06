"""Short runs of the DPO stage on the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from rlhf.config.load import check_config
from rlhf.dpo.config import DPOConfig


def config(path: Path, data: str | dict[str, str], **values: Any) -> DPOConfig:
    """A short run on the tiny Llama: 5 steps of 8 rankings of a dataset, or of what `data` says; one evaluation."""
    data = {"train": data} if isinstance(data, str) else data
    base = {"run": str(path / "run"), "model": {"path": tiny.llama()}, "data": data, "eval": {"every": 5}}
    base |= {"batch": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 5}, "optimizer": {"lr": 1e-3}}
    return check_config(DPOConfig, base | values, "test")
