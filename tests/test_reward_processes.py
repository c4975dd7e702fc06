"""The reward stage killed and resumed, and on two processes under ZeRO: the same figures and weights."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from logged import lines as metrics_of
from reward_runs import config, steps
from transformers import AutoModelForSequenceClassification

from rlhf.config.load import dump_config
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.reward.config import RewardConfig
from rlhf.runs.run import is_run, read_run

pytestmark = pytest.mark.slow


PROGRAM = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from rlhf import distributed
from rlhf.runs import checkpoint
from rlhf.reward.config import RewardConfig
from rlhf.config.load import load_stage_config
from stages import reward

file, kill, resume = sys.argv[1:4]
where, _, when = kill.partition(":")
if where == "step":
    step = reward.Loop._train_step
    def killed(self):
        if self.step == int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)
    reward.Loop._train_step = killed
if where == "write":
    seal = checkpoint._seal
    def killed(partial, step):
        if step == int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return seal(partial, step)
    checkpoint._seal = killed
distributed.name_lost_ranks(reward.run)(load_stage_config(RewardConfig, file), resume=resume == "True")
distributed.stop()
"""


def launch(made: RewardConfig, processes: int = 1, kill: str = "none") -> int:
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
        "batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 10},
        "log": {"every": 2},
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
    values = {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 5}, "checkpoints": {"every": 2}}
    one = config(tmp_path / "one", rankings, **values)
    two = config(tmp_path / "two", rankings, **values, deepspeed=f"configs/deepspeed/zero{stage}.json")
    launch(one)
    launch(two, 2)
    assert read_run(two.run)["processes"] == 2
    names = ("train/loss", "optimizer/grad_norm", "optimizer/lr", "train/tokens")
    torch.testing.assert_close(
        steps(metrics_of(two.run), *names), steps(metrics_of(one.run), *names), rtol=1e-3, atol=1e-4
    )
    first, second = (json.loads((Path(run) / "reward_metrics.json").read_text()) for run in (one.run, two.run))
    assert first["pairs"] == second["pairs"] and first["step"] == second["step"]
    assert second["log_loss"] == pytest.approx(first["log_loss"], rel=1e-2)
    models = [AutoModelForSequenceClassification.from_pretrained(f"{run}/model") for run in (one.run, two.run)]
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3, msg=name)


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
    }
    whole, broken = config(tmp_path / "whole", rankings, **values), config(tmp_path / "broken", rankings, **values)
    launch(whole, 2)
    assert launch(broken, 2, kill="step:3") != 0
    launch(broken, 2)
    assert metrics_of(broken.run) == metrics_of(whole.run)
    assert read_run(broken.run)["model_fingerprint"] == read_run(whole.run)["model_fingerprint"]
