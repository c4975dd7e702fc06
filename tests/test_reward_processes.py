"""The reward stage killed and resumed, and on two processes under ZeRO: the same figures and weights."""

from __future__ import annotations

import functools
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import stage_processes
import tiny
import torch
from logged import lines as metrics_of
from reward_runs import config, steps
from stage_processes import check_same_figures
from transformers import AutoModelForSequenceClassification

from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.runs.run import read_run

pytestmark = pytest.mark.slow


launch = functools.partial(stage_processes.launch, "reward")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, rankings: str) -> None:
    values = {
        "checkpoints": {"every": 3},
        "batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 10},
        "log": {"every": 2},
        "eval": {"every": 2},
    }
    whole, broken = config(tmp_path / "whole", rankings, **values), config(tmp_path / "broken", rankings, **values)
    launch(whole)
    assert launch(broken, kill="step:5") == -signal.SIGKILL
    assert launch(broken, kill="write:6") == -signal.SIGKILL
    assert read_run(broken.run)["status"] == "running"
    launch(broken)
    assert metrics_of(broken.run) == metrics_of(whole.run)
    for name in ("metrics", "scale", "step", "model_fingerprint"):
        assert read_run(broken.run)[name] == read_run(whole.run)[name]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_under_zero_do_what_one_does(stage: int, tmp_path: Path, rankings: str) -> None:
    values = {
        "batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 5},
        "checkpoints": {"every": 2},
        "eval": {"every": 2},
    }
    one = config(tmp_path / "one", rankings, **values)
    two = config(tmp_path / "two", rankings, **values, deepspeed=f"configs/deepspeed/zero{stage}.json")
    launch(one)
    launch(two, 2)
    names = ("train/loss", "optimizer/grad_norm", "optimizer/lr", "train/tokens")
    check_same_figures(one.run, two.run, AutoModelForSequenceClassification, *names)


def test_two_processes_divide_by_the_weights_of_all_rankings(tmp_path: Path) -> None:
    """Rankings of weight 5 fall on the processes unevenly, so a mean within each would be another number."""
    plain = tiny.write_rankings(tmp_path / "plain", 24, candidates=3)
    with DatasetWriter(tmp_path / "weighted", "ranking", overwrite=True) as writer:
        for number, record in enumerate(open_dataset(plain).records()):
            writer.write(replace(record, weight=5.0 if number % 3 == 0 else 0.1))
    values = {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 3}}
    one = config(tmp_path / "one", str(tmp_path / "weighted"), **values)
    two = config(tmp_path / "two", str(tmp_path / "weighted"), **values)
    launch(one)
    launch(two, 2)
    torch.testing.assert_close(
        steps(metrics_of(two.run), "train/loss", "optimizer/grad_norm"),
        steps(metrics_of(one.run), "train/loss", "optimizer/grad_norm"),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_two_processes_under_zero3_go_on_bit_for_bit_after_a_kill(tmp_path: Path, rankings: str) -> None:
    values = {
        "batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 6},
        "checkpoints": {"every": 2},
        "deepspeed": "configs/deepspeed/zero3.json",
        "eval": {"every": 2},
    }
    whole, broken = config(tmp_path / "whole", rankings, **values), config(tmp_path / "broken", rankings, **values)
    launch(whole, 2)
    assert launch(broken, 2, kill="step:3") != 0
    launch(broken, 2)
    assert metrics_of(broken.run) == metrics_of(whole.run)
    assert read_run(broken.run)["model_fingerprint"] == read_run(whole.run)["model_fingerprint"]
