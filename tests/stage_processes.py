"""Runs of the DPO and the reward stage in processes of their own, which may end themselves by SIGKILL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logged import lines
from reward_runs import steps

from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config
from rlhf.runs.run import is_run, read_run

PROGRAM = """
import importlib, os, signal, sys
import torch
torch.set_num_threads(1)
from rlhf import distributed
from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import load_stage_config
from rlhf.dpo import reference
from rlhf.runs import checkpoint

name, file, kill, resume = sys.argv[1:5]
stage = importlib.import_module(f"stages.{name}")
where, _, when = kill.partition(":")

def killed_before(owner, function, due):
    usual = getattr(owner, function)
    def maybe_killed(*words):
        if due(*words):
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*words)
    setattr(owner, function, maybe_killed)

if where == "step":
    killed_before(stage.Loop, "_train_step", lambda loop: loop.step == int(when))
if where == "write":
    killed_before(checkpoint, "_seal", lambda partial, step: step == int(when))
if where == "reference":
    killed_before(reference.os, "replace", lambda before, after: True)
distributed.name_lost_ranks(stage.run)(load_stage_config(STAGES[name], file), resume=resume == "True")
distributed.stop()
"""


def launch(stage: str, made: StageConfig, processes: int = 1, kill: str = "none") -> int:
    """Start or continue a run; `kill` is the moment at which the process ends itself by SIGKILL.

    `step:5` is before that step, `write:6` before the checkpoint of that step is sealed, and `reference` before the
    log-probs of DPO's reference are kept.
    """
    file = Path(made.run).parent / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(made), "utf-8")
    result = tiny.launch(processes, PROGRAM, stage, str(file), kill, str(is_run(made.run)))
    if kill == "none":
        assert result.returncode == 0, result.stdout[-4000:]
    return result.returncode


def check_same_figures(one: str, two: str, kind: Any, *names: str) -> None:
    """Whether a run on one process and one on two have the same logged numbers, held-out metrics and weights."""
    assert read_run(two)["processes"] == 2
    torch.testing.assert_close(steps(lines(two), *names), steps(lines(one), *names), rtol=1e-3, atol=1e-4)
    first, second = (json.loads((Path(run) / "reward_metrics.json").read_text()) for run in (one, two))
    assert first["pairs"] == second["pairs"] and first["step"] == second["step"]
    assert second["log_loss"] == pytest.approx(first["log_loss"], rel=1e-2)
    models = [kind.from_pretrained(f"{run}/model") for run in (one, two)]
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3, msg=name)
