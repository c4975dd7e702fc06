"""The DPO stage killed and resumed, and on two processes under ZeRO: the same figures and weights."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest
import stage_processes
from dpo_runs import config
from logged import lines as metrics_of
from stage_processes import check_same_figures
from transformers import AutoModelForCausalLM

from rlhf.runs.run import read_run

pytestmark = pytest.mark.slow


launch = functools.partial(stage_processes.launch, "dpo")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, rankings: str) -> None:
    values = {
        "checkpoints": {"every": 3},
        "batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 8},
        "log": {"every": 2},
        "eval": {"every": 2},
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
    values = {
        "batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 4},
        "checkpoints": {"every": 2},
        "eval": {"every": 2},
    }
    values |= {"loss": "plackett-luce", "tuning": tuning, "sft_coef": 0.1}
    one = config(tmp_path / "one", rankings, **values)
    two = config(tmp_path / "two", rankings, **values, deepspeed=f"configs/deepspeed/zero{stage}.json")
    launch(one)
    launch(two, 2)
    names = ("train/loss", "optimizer/grad_norm", "rewards/margins", "logps/chosen", "train/tokens")
    check_same_figures(one.run, two.run, AutoModelForCausalLM, *names)
