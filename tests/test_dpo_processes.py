"""The DPO stage killed and resumed, and on two processes under ZeRO: the same figures and weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tiny
import torch
from dpo_runs import config
from logged import lines as metrics_of
from reward_runs import steps
from transformers import AutoModelForCausalLM

from rlhf.config.load import dump_config
from rlhf.dpo.config import DPOConfig
from rlhf.runs.run import is_run, read_run

pytestmark = pytest.mark.slow


PROGRAM = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from rlhf import distributed
from rlhf.dpo import reference
from rlhf.dpo.config import DPOConfig
from rlhf.config.load import load_stage_config
from stages import dpo

file, kill, resume = sys.argv[1:4]
where, _, when = kill.partition(":")
if where == "step":
    step = dpo.Loop._train_step
    def killed(self):
        if self.step == int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)
    dpo.Loop._train_step = killed
if where == "reference":
    def killed(before, after):
        os.kill(os.getpid(), signal.SIGKILL)
    reference.os.replace = killed
distributed.name_lost_ranks(dpo.run)(load_stage_config(DPOConfig, file), resume=resume == "True")
distributed.stop()
"""


def launch(made: DPOConfig, processes: int = 1, kill: str = "none") -> int:
    """Start or continue a run; `kill` names a place and step where the process ends itself by SIGKILL."""
    file = Path(made.run).parent / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(made), "utf-8")
    result = tiny.launch(processes, PROGRAM, str(file), kill, str(is_run(made.run)))
    if kill == "none":
        assert result.returncode == 0, result.stdout[-4000:]
    return result.returncode


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, rankings: str) -> None:
    values = {
        "checkpoints": {"every": 3},
        "batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 8},
        "log": {"every": 2},
    }
    whole, broken = config(tmp_path / "whole", rankings, **values), config(tmp_path / "broken", rankings, **values)
    launch(whole)
    assert launch(broken, kill="reference") == -signal.SIGKILL
    assert launch(broken, kill="step:5") == -signal.SIGKILL
    assert read_run(broken.run)["status"] == "running"
    launch(broken)
    assert metrics_of(broken.run) == metrics_of(whole.run)
    for name in ("metrics", "step", "model_fingerprint"):
        assert read_run(broken.run)[name] == read_run(whole.run)[name]


@pytest.mark.parametrize(("stage", "tuning"), [(2, "full"), (3, "lora")])
def test_two_processes_under_zero_do_what_one_does(stage: int, tuning: str, tmp_path: Path, rankings: str) -> None:
    values = {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 4}, "checkpoints": {"every": 2}}
    values |= {"loss": "plackett-luce", "tuning": tuning, "sft_coef": 0.1}
    one = config(tmp_path / "one", rankings, **values)
    two = config(tmp_path / "two", rankings, **values, deepspeed=f"configs/deepspeed/zero{stage}.json")
    launch(one)
    launch(two, 2)
    assert read_run(two.run)["processes"] == 2
    names = ("train/loss", "optimizer/grad_norm", "rewards/margins", "logps/chosen", "train/tokens")
    torch.testing.assert_close(
        steps(metrics_of(two.run), *names), steps(metrics_of(one.run), *names), rtol=1e-3, atol=1e-4
    )
    first, second = (json.loads((Path(run) / "reward_metrics.json").read_text()) for run in (one.run, two.run))
    assert first["pairs"] == second["pairs"] and first["step"] == second["step"]
    assert second["log_loss"] == pytest.approx(first["log_loss"], rel=1e-2)
    models = [AutoModelForCausalLM.from_pretrained(f"{run}/model") for run in (one.run, two.run)]
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3, msg=name)
