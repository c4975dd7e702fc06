"""Run folders as `open_run` makes them, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf.config.load import check_config
from rlhf.runs.run import Run, finish, open_run
from rlhf.sft.config import SFTConfig


def config(folder: Path, **more: Any) -> SFTConfig:
    values = {"run": str(folder), "model": {"path": "m"}, "data": {"train": "d"}, **more}
    return check_config(SFTConfig, values, "test")


def opened(folder: Path, resume: bool = False, overwrite: bool = False, facts: Any = None, **more: Any) -> Run:
    return open_run(config(folder, **more), "sft", resume, overwrite, facts or {})


def finished(folder: Path, facts: Any = None, **more: Any) -> Run:
    run = opened(folder, facts=facts, **more)
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    save_file({"weights": torch.zeros(2)}, run.model / "model.safetensors")
    finish(run, metrics={"eval/loss": 1.0})
    return run
