"""One base for four roles on two processes, at every ZeRO stage: what one process gives; and exact resume."""

from __future__ import annotations

import json

import ppo_processes as processes
import pytest
import tiny
import torch
import yaml
from logged import lines as metrics
from shared_base_runs import LAST, LORA, adapters_of, parents, values_of

pytestmark = pytest.mark.slow


def write(folder, *args, **changes):
    """A config file for a run in the folder."""
    folder.mkdir(exist_ok=True)
    more = {"timeout_seconds": 240, "updates": 2, **changes}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(values_of(folder / "run", *args, **more)))
    return folder / "ppo.yaml"


def deepspeed(stage: int) -> str:
    return str(tiny.REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json")


@pytest.fixture(scope="module")
def runs():
    return parents()


@pytest.fixture(scope="module")
def single(tmp_path_factory, runs, prompts):
    """Runs of one process: adapters in all layers, and in the last one."""
    folders = {}
    for name, reward, tuning in (("all", "over-sft", LORA), ("last", "last", LAST)):
        folders[name] = tmp_path_factory.mktemp(name)
        file = write(folders[name], prompts, runs["sft"], runs[reward], tuning=tuning)
        processes.complete(1, file)
    return folders


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_two_processes_give_what_one_gives(stage, layers, single, tmp_path, runs, prompts):
    reward, tuning = ("over-sft", LORA) if layers == "all" else ("last", LAST)
    changes = {"deepspeed": deepspeed(stage), "gradient_checkpointing": stage == 3}
    changes["rollout__merge_adapters"] = stage == 3
    # now and then one of the two has no sequence left for a pass
    changes["batch__micro_batch_tokens"] = 1 if stage % 2 else 160
    processes.complete(2, write(tmp_path, prompts, runs["sft"], runs[reward], tuning=tuning, **changes))
    found, expected = metrics(tmp_path / "run"), metrics(single[layers] / "run")
    assert any(line["rollout/response_length"] % 1 for line in expected if "objective/kl_coef" in line), (
        "unequal lengths are the point"
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    plain = adapters_of(single[layers] / "run")
    for name, weight in adapters_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, plain[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_run_continues_bit_for_bit(stage, tmp_path, runs, prompts):
    files = [
        write(tmp_path / name, prompts, runs["sft"], runs["over-sft"], deepspeed=deepspeed(stage))
        for name in ("whole", "cut")
    ]
    processes.complete(2, files[0])
    written = (tmp_path / "cut" / "run" / "checkpoints" / "step-00000001").is_dir
    processes.kill_when(processes.start(2, files[1]), written)
    assert json.loads((tmp_path / "cut" / "run" / "run.json").read_text())["status"] == "running"
    assert "Continuing after update" in processes.complete(2, files[1], "--resume")
    assert metrics(tmp_path / "cut" / "run") == metrics(tmp_path / "whole" / "run")
    whole, cut = (adapters_of(tmp_path / name / "run") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_finished_run_under_zero_1_goes_on_bit_for_bit(tmp_path, runs, prompts):
    """Without a kill, which takes longer: what one update left is continued as if it had not been the last."""
    changes = {"deepspeed": deepspeed(1), "eval__prompts": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    processes.complete(2, write(whole, prompts, runs["sft"], runs["over-sft"], updates=2, **changes))
    for updates, *resume in ((1,), (2, "--resume")):
        file = write(cut, prompts, runs["sft"], runs["over-sft"], updates=updates, **changes)
        output = processes.complete(2, file, *resume)
    assert "Continuing after update" in output
    assert metrics(cut / "run") == metrics(whole / "run")
    mine, theirs = adapters_of(cut / "run"), adapters_of(whole / "run")
    assert mine and all(torch.equal(mine[name], theirs[name]) for name in theirs)
