"""Short runs of instruction tuning on the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from logged import lines
from safetensors.torch import load_file
from torch import Tensor

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


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- killed, and on several processes ------------------------------------------------------------------------------

RUN = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import stages.sft as sft
from rlhf.sft.config import SFTConfig
from rlhf.config.load import check_config
from rlhf.cli.entry import run
from rlhf.cli.errors import exit_on_error
from rlhf.training import engine
from rlhf.training.loop import Loop

KILL = sys.argv[2]  # "in-step 5", "in-write 6" or nothing
RANK = int(os.environ.get("RANK", "0"))
STEP = [0]  # that the loop is in, from 0

def follow(self, train_step=Loop._train_step):
    STEP[0] = self.step
    return train_step(self)
Loop._train_step = follow

def die_at(owner, name, when):
    usual = getattr(owner, name)
    def dying(*args, **kwargs):
        result = usual(*args, **kwargs)
        if STEP[0] == when and RANK == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, dying)

if KILL:
    where, step = KILL.split()
    if where == "in-step":
        for kind in (sft.SFTObjective, sft.LogitsObjective, sft.StepByStepObjective):
            die_at(kind, "loss", int(step))
    for kind in (engine.Engine, engine.DeepSpeedEngine) if where == "in-write" else ():
        die_at(kind, "save", int(step) - 1)
with exit_on_error():
    run(sft.run, check_config(SFTConfig, json.loads(sys.argv[1]), "the test"), sys.argv[3] == "1", False)
"""


def launch(processes: int, values: dict[str, Any], kill: str = "", resume: bool = False) -> Path:
    done = tiny.launch(processes, RUN, json.dumps(values), kill, str(int(resume)))
    assert (done.returncode != 0) == bool(kill), done.stdout[-4000:]
    return Path(values["run"])


def zero(tmp_path: Path, stage: int) -> str:
    file = tmp_path / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    return str(file)
