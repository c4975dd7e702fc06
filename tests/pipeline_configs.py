"""A working folder of a pipeline of tiny stages, and commands in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny
import yaml

from stages import pipeline

DRY_RUN = pipeline.StartOptions(dry_run=True)


def write_place(folder: Path) -> Path:
    """Fill a working folder: datasets, a model, the three configs and the pipeline's."""
    tiny.write_demonstrations(folder / "demos", 12, 4)
    tiny.write_rankings(folder / "rankings", 12, 4)
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    configs = {
        "sft": {
            "run": "runs/sft",
            "model": {"path": "base"},
            "data": {"train": "demos"},
            "batch": batch,
            "eval": {"samples": 1},
        },
        "reward": {"run": "runs/reward", "model": {"path": "runs/sft"}, "data": {"train": "rankings"}, "batch": batch},
        "ppo": {
            "run": "runs/ppo",
            "model": {"path": "runs/sft"},
            "data": {"prompts": "rankings", "max_prompt_tokens": 64},
            "reward": {"name": "model", "path": "runs/reward"},
            "updates": 2,
            "rollout": {"prompts_per_update": 4, "max_new_tokens": 8},
            "batch": {"epochs": 1, "minibatches": 1},
            "eval": {"prompts": 2},
        },
    }
    for stage, values in configs.items():
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values), "utf-8")
    files = {stage: f"{stage}.yaml" for stage in configs}
    (folder / "all.yaml").write_text(yaml.safe_dump({"name": "toy", **files, "export": "out"}), "utf-8")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}", "utf-8")
    return folder


def rlhf(place: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.cli", *words]
    return subprocess.run(
        command, cwd=place, env=environment, input=stdin, capture_output=True, text=True, timeout=1100
    )
