"""PPO runs in processes of their own, which a test may kill."""

from __future__ import annotations

import os
import time

import tiny
import yaml

PROGRAM = "from stages.ppo import main, run; main('ppo')"


def write_config(folder, prompts, reward_model, **more):
    values = {
        "run": str(folder / "run"),
        "model": {"path": tiny.llama()},
        "data": {"prompts": prompts, "max_prompt_tokens": 48},
        "reward": {"name": "model", "path": reward_model},
        "updates": 3,
        "rollout": {"prompts_per_update": 7, "max_new_tokens": 14, "stop": ["e", "a"]},
        "kl": {"controller": {"name": "adaptive", "init_coef": 0.1, "target": 0.01, "horizon": 100}},
        "shaping": {"normalize_scores": True},
        "batch": {"epochs": 1, "minibatches": 2, "micro_batch_tokens": 120},
        "optimizer": {"policy_lr": 1e-3, "critic_lr": 1e-3, "schedule": "constant", "eps": 1e-3},
        "eval": {"every": 3, "prompts": 3},
        "checkpoints": {"every": 1},
        "timeout_seconds": 240,
        **more,
    }
    folder.mkdir(exist_ok=True)
    (folder / "ppo.yaml").write_text(yaml.safe_dump(values))
    return folder / "ppo.yaml"


def environment():
    path = os.pathsep.join([str(tiny.REPOSITORY), str(tiny.REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(processes, file, *words):
    return tiny.start(processes, PROGRAM, "--config", str(file), *words)


def complete(processes, file, *words):
    done = tiny.launch(processes, PROGRAM, "--config", str(file), *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def kill_when(ranks, seen):
    """SIGKILL the ranks at the first moment that `seen()` is true."""
    deadline = time.monotonic() + 480
    while not seen():
        assert ranks.poll() is None, ranks.text
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    ranks.kill()
