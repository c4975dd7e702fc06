"""What a dry run says of the shares of many processes, none of which it starts."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlhf.cli.dry_run import share_rows
from rlhf.config.load import check_config
from rlhf.ppo.batching import divide
from rlhf.ppo.config import PPOConfig
from stages.cli import app


def ppo(prompts: int, answers: int, minibatches: int, **more) -> PPOConfig:
    values = {"run": "runs/x", "model": {"path": tiny.llama()}, "data": {"prompts": "d", "max_prompt_tokens": 40}}
    values |= {"reward": {"name": "function", "function": "ppo_rewards:one"}, "critic": {"init": "policy"}}
    values |= {"rollout": {"prompts_per_update": prompts, "samples_per_prompt": answers, "max_new_tokens": 60}}
    values |= {"batch": {"minibatches": minibatches, "micro_batch_tokens": 200}, **more}
    return check_config(PPOConfig, values, "test")


@pytest.mark.parametrize(
    ("config", "processes", "rollout", "minibatch"),
    [
        (ppo(1024, 4, 2), 512, "8 completions a process", "4 episodes a process, in 2 passes"),
        (ppo(5, 1, 1), 2, "2 to 3 completions a process", "2 to 3 episodes a process, in 2 passes"),
        (
            ppo(64, 4, 1), 512, "0 to 1 completions a process; 256 of 512 processes have none and wait",
            "0 to 1 episodes a process, in 1 passes; 256 of 512 processes have none and wait",
        ),
    ],
)  # fmt: skip
def test_the_shares_of_an_update(config, processes, rollout, minibatch):
    rows = dict(share_rows(config, processes))
    assert (rows["share of a rollout"], rows["share of a minibatch"]) == (rollout, minibatch)


def test_the_shares_of_weights_are_those_of_the_zero_stage(tmp_path):
    sizes = [tensor.numel() for tensor in load_file(f"{tiny.llama()}/model.safetensors").values()]
    found = {}
    for stage in range(4):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        found[stage] = dict(share_rows(ppo(8, 1, 1, deepspeed=str(file)), 512))
    padded = sum(-(-size // 512) for size in sizes)
    assert found[3]["share of weights"] == f"{padded:,} of {sum(sizes):,} on each process (stage 3)"
    assert found[2]["share of weights"] == f"{sum(sizes):,} of {sum(sizes):,} on each process (stage 2)"
    state = [found[stage]["share of optimizer"] for stage in range(4)]
    held = [sum(sizes), -(-sum(sizes) // 512), -(-sum(sizes) // 512), padded]
    assert state == [f"the state of {count:,} weights on each process" for count in held]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("episodes", [3, 511, 2048])
def test_512_ranks_share_every_episode_once_in_equally_many_passes(episodes, packed):
    draw = torch.Generator().manual_seed(episodes)
    totals = torch.randint(20, 900, (episodes,), generator=draw).tolist()
    for ranks in divide(totals, torch.randperm(episodes, generator=draw).tolist(), 2, 2048, packed, 512):
        assert len(ranks) == 512 and len({len(rank) for rank in ranks}) == 1
        held = sorted(episode for rank in ranks for batch in rank for episode in batch)
        assert len(held) == len(set(held)) and abs(len(held) - episodes / 2) < 1


def test_a_dry_run_for_512_processes_starts_none(demos, tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text(f"model: {{path: {tiny.llama()}}}\ndata: {{train: {demos}}}\nrun: {tmp_path}/run\n")

    def dry_run(batch_size: int):
        words = ["sft", "--config", str(file), f"batch.batch_size={batch_size}", "--num-processes", "512", "--dry-run"]
        return CliRunner().invoke(app, words)

    done = dry_run(1000)
    assert done.exit_code == 2 and "does not divide by 512 processes" in done.output
    done = dry_run(1024)
    assert done.exit_code == 0, done.output
    assert "1024 records a step = 512 x 1 x 2" in done.output and "share of optimizer" in done.output
    assert not (tmp_path / "run").exists()
