"""PPO runs in processes of their own, which a test may kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import tiny
import yaml


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


def command(processes, file, *words):
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        python += ["--master_addr", "127.0.0.1", "--master_port", str(tiny.free_port())]
    return [*python, "-m", "stages.ppo", "--config", str(file), *words]


def environment():
    path = os.pathsep.join([str(tiny.REPOSITORY), str(tiny.REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(processes, file, *words):
    return subprocess.Popen(
        command(processes, file, *words), cwd=tiny.REPOSITORY, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def complete(processes, file, *words):
    program = "from stages.ppo import main, run; main('ppo')"
    done = tiny.launch(processes, program, "--config", str(file), *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def kill_when(process, seen):
    """SIGKILL the process and its ranks at the first moment that `seen()` is true."""
    deadline = time.monotonic() + 480
    while not seen():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:  # ranks are not in torchrun's process group
        member.kill()
    process.communicate()
