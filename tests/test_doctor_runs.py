"""`rlhf doctor` on real runs: a zoo of broken ones, each named, and healthy ones, none accused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo_runs
import guard_runs
import ppo_runs
import pytest
import reward_runs
import sft_runs
import tiny
import torch

import stages.dpo
import stages.ppo
import stages.reward
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.doctor.diagnosis import diagnose
from rlhf.doctor.evidence import read_evidence
from rlhf.doctor.findings import Finding

pytestmark = pytest.mark.slow
UPDATES = 12
TWICE: dict[str, Any] = {"eval": {"every": 2}}
"""Evaluations enough for the checks that do not judge by the first one."""
LONG = {"rollout__max_new_tokens": 24, "eval__every": 6, "updates": UPDATES, "checkpoints__every": 100}


def findings(run) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(read_evidence(run))}


# ---- PPO: sabotaged configs, and sabotaged models


FREE = {"name": "fixed", "coef": 0.0}
CONFIGS = {
    "reward-constant": {"reward": {"name": "function", "function": "ppo_rewards:one"}},
    "policy-does-not-move, clipping-dead": {"optimizer__policy_lr": 1e-12},
    "policy-runs-away": {"optimizer__policy_lr": 0.05, "kl__controller": FREE},
    "clipping-saturated": {
        "optimizer__policy_lr": 5e-3,
        "batch__epochs": 8,
        "kl__controller": {"name": "fixed", "coef": 0.0},
    },
    "never-ends, prompts-cut": {"rollout__max_new_tokens": 3, "data__max_prompt_tokens": 6},
    "critic-useless": {"optimizer__critic_lr": 1e-12},
    "reward-explodes, guard-fired": {
        "reward": {"name": "function", "function": "ppo_rewards:growing"},
        "guard": guard_runs.guard(),
    },
}


@pytest.mark.parametrize("names", CONFIGS)
def test_a_broken_config_is_named(names, tmp_path, demos):
    stages.ppo.run(ppo_runs.config(tmp_path / "run", demos, **LONG | CONFIGS[names]))
    assert set(names.split(", ")) <= findings(tmp_path / "run").keys()


def dropout_while_learning(stage):
    """Noise on the logits wherever there is a gradient."""
    head = stage.models.policy.lm_head
    head.register_forward_hook(lambda *_: _[2] * 1.05 if torch.is_grad_enabled() else None)


def wrong_reference(stage):
    stage.models._frozen_reference.policy.lm_head.weight.data.mul_(1.5)


def end_token_at_once(stage):
    def louder(module, inputs, logits):
        logits[..., stage.chat.end_id] += 30

    stage.models.policy.lm_head.register_forward_hook(louder)
    stage.models._frozen_reference.policy.lm_head.register_forward_hook(louder)


def one_answer(stage):
    """Only one token is ever likely."""

    def louder(module, inputs, logits):
        logits[..., 40] += 60

    stage.models.policy.lm_head.register_forward_hook(louder)
    stage.models._frozen_reference.policy.lm_head.register_forward_hook(louder)


SABOTAGE = {
    "first-ratio": dropout_while_learning,
    "starts-away-from-the-reference": wrong_reference,
    "ends-at-once": end_token_at_once,
    "identical-completions": one_answer,
    "repeats-itself": one_answer,
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_model_is_named(name, tmp_path, demos):
    config = ppo_runs.config(
        tmp_path / "run", demos, **LONG | {"updates": 6, "eval__prompts": 8, "rollout__max_new_tokens": 40}
    )
    stage = stages.ppo.PPO(config, resume=False, overwrite=False)
    SABOTAGE[name](stage)
    stage.train()
    assert name in findings(tmp_path / "run")


def test_a_sampler_with_old_weights_is_named(tmp_path, demos):
    changes = LONG | {"rollout__sampler": "transformers", "updates": 6}
    stage = stages.ppo.PPO(ppo_runs.config(tmp_path / "run", demos, **changes), resume=False, overwrite=False)
    rollout = stage.rollout

    def stale(prompts):
        head = stage.models.policy.lm_head.weight
        before = head.data.clone()
        head.data.mul_(2)
        found = rollout(prompts)
        head.data.copy_(before)
        return found

    stage.rollout = stale
    stage.train()
    assert "sampler-gap" in findings(tmp_path / "run")


def test_a_run_that_a_reward_has_stopped_is_named(tmp_path, demos):
    reward = {"name": "function", "function": "ppo_rewards:broken"}
    with pytest.raises(UserError):
        stages.ppo.run(ppo_runs.config(tmp_path / "run", demos, reward=reward))
    assert findings(tmp_path / "run").keys() == {"stopped"}


# ---- SFT and reward models


@pytest.mark.parametrize(
    ("name", "rate", "epochs"), [("loss-does-not-fall", 1e-12, 6), ("loss-diverges", 3.0, 6), ("overfits", 0.02, 30)]
)
def test_instruction_tuning_at_a_wrong_rate_is_named(name, rate, epochs, tmp_path):
    demos = tiny.write_demonstrations(tmp_path / "demos", 16)
    batch = {"batch_size": 8, "micro_batch_size": 8, "epochs": epochs}
    optimizer = {"lr": rate, "schedule": "constant", "warmup": 0}
    values = sft_runs.settings(demos, tmp_path / "run", batch=batch, optimizer=optimizer)
    sft_runs.run(values | {"eval": {"every": 4}, "checkpoints": {"every": 100}})
    assert name in findings(tmp_path / "run")


def test_a_reward_model_whose_held_out_rankings_are_reversed_is_named(tmp_path, rankings):
    with DatasetWriter(tmp_path / "reversed", "ranking") as writer:
        for record in open_dataset(rankings).records("eval"):
            worst = max(record.ranks)
            writer.write(replace(record, ranks=tuple(1 + worst - rank for rank in record.ranks)))
    data = {"train": rankings, "eval": str(tmp_path / "reversed")}
    stages.reward.run(reward_runs.config(tmp_path, data, **TWICE))
    assert "no-better-than-guessing" in findings(tmp_path / "run")


# ---- nothing wrong


def test_healthy_runs_are_not_accused(tmp_path, demos, rankings):
    sft_runs.run(sft_runs.settings(demos, tmp_path / "sft"))
    sft_runs.run(sft_runs.settings(demos, tmp_path / "lora", tuning={"name": "lora", "rank": 4}))
    stages.reward.run(reward_runs.config(tmp_path / "reward", rankings, **TWICE))
    stages.reward.run(reward_runs.config(tmp_path / "pairs", rankings, loss="bradley-terry", **TWICE))
    stages.dpo.run(dpo_runs.config(tmp_path / "dpo", rankings, **TWICE))
    stages.dpo.run(dpo_runs.config(tmp_path / "adapter", rankings, tuning={"name": "lora", "rank": 4}, **TWICE))
    sft_runs.run(sft_runs.settings(demos, tmp_path / "bottleneck", tuning={"name": "bottleneck", "size": 4}))
    for name in ("sft", "lora", "bottleneck", "reward/run", "pairs/run", "dpo/run", "adapter/run"):
        assert findings(tmp_path / name) == {}, name


def test_the_finished_demo_is_not_accused():
    demo = os.environ.get("FINISHED_DEMO")
    if not demo:
        pytest.skip("FINISHED_DEMO names no finished demo")
    for stage in ("sft", "reward", "ppo"):
        run = Path(tiny.REPOSITORY) / demo / stage
        assert json.loads((run / "run.json").read_text())["status"] == "complete"
        assert not {name for name, f in findings(run).items() if f.severity != "note"}, stage
