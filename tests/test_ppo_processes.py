"""PPO on two processes equals one; killed runs continue bit for bit, whenever the kill comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from rlhf.ppo.metrics import TIMINGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "demos", 24, held_out=3)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A scalar-head folder with the policy's tokenizer: reward model and critic, so that ZeRO-3 shards those too."""
    from rlhf.config.base import ModelConfig
    from rlhf.models.scalar import load_scalar

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("reward")
    scalar = load_scalar(ModelConfig(path=tiny.llama()), tiny.llama())
    scalar.set_scale(0.1, 2.0)
    scalar.model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


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
        "timeout_seconds": 60,
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


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


@pytest.fixture(scope="module")
def single(tmp_path_factory, prompts, reward_model):
    folder = tmp_path_factory.mktemp("single")
    complete(1, write_config(folder, prompts, reward_model))
    return folder


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tokens", [120, 1], ids=["several", "one_sequence_a_pass"])
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_two_processes_give_the_single_process_metrics(stage, tokens, packing, single, tmp_path, prompts, reward_model):
    """With one sequence a pass, of minibatches of 3 and 4, one of the two runs out of passes before the other."""
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / f"{stage}.json")
    batch = {"epochs": 1, "minibatches": 2, "micro_batch_tokens": tokens, "packing": packing}
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, batch=batch))
    found, expected = metrics(tmp_path), metrics(single)
    lengths = [line["rollout/response_length"] for line in expected if "objective/kl_coef" in line]
    assert any(length != int(length) for length in lengths), "answers of unequal length are the point"
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    weights, plain = (load_file(f / "run" / "model" / "model.safetensors") for f in (tmp_path, single))
    for name, weight in plain.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)


def test_two_processes_with_compiled_layers_give_the_single_process_metrics(single, tmp_path, prompts, reward_model):
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json")
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, compile=True))
    for mine, theirs in zip(metrics(tmp_path), metrics(single), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)


def test_two_processes_sample_by_continuous_batching_and_weigh_its_log_probs(tmp_path, prompts, reward_model):
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero3.json")
    rollout = {"prompts_per_update": 7, "max_new_tokens": 14, "sampler": "transformers", "temperature": 0.8}
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, rollout=rollout))
    lines = [line for line in metrics(tmp_path) if "objective/kl_coef" in line]
    assert len(lines) == 3
    for line in lines:
        # a log-prob that came to another token on the way would lie whole nats off
        assert 0 < line["rollout/sampler_gap_mean"] <= line["rollout/sampler_gap_max"] < 1e-4
        assert line["rollout/importance_truncated"] == 0


def kill_when(process, seen):
    """SIGKILL the process and its ranks at the first moment that `seen()` is true."""
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:  # ranks are not in torchrun's process group
        member.kill()
    process.communicate()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", ["learning", "writing a checkpoint"])
def test_a_killed_run_continues_bit_for_bit(processes, moment, tmp_path, prompts, reward_model):
    settings = {"deepspeed": str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json")} if processes > 1 else {}
    files = [write_config(tmp_path / name, prompts, reward_model, **settings) for name in ("whole", "cut")]
    complete(processes, files[0])
    checkpoints = tmp_path / "cut" / "run" / "checkpoints"

    def learning():
        return (checkpoints / "step-00000001").is_dir()

    def writing():
        return (checkpoints / ".step-00000002.partial").is_dir()

    kill_when(start(processes, files[1]), learning if moment == "learning" else writing)
    assert json.loads((tmp_path / "cut" / "run" / "run.json").read_text())["status"] == "running"
    output = complete(processes, files[1], "--resume")
    assert "Continuing after update" in output
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / n / "run" / "model" / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resuming_with_another_number_of_processes_says_what_to_do(tmp_path, prompts, reward_model):
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json")
    file = write_config(tmp_path, prompts, reward_model, deepspeed=settings)
    kill_when(start(2, file), (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir)
    process = start(1, file, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "written by 2 processes" in output and "Resume with --num-processes 2" in output
