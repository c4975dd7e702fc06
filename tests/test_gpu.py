"""What only a CUDA device can show: `pytest -m gpu tests/test_gpu.py`. Everything else in tests/ runs on a CPU."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys

import ppo_runs
import pytest
import sft_runs
import tiny
import torch
from families import FAMILIES, PROMPTS, by_generate, chat_like
from logged import updates
from ppo_processes import write_config

from rlhf.config.base import ModelConfig
from rlhf.models.forward import token_logprobs
from rlhf.models.load import load_policy
from rlhf.rollout.samplers import hf
from rlhf.rollout.types import SamplingParams
from stages.ppo import PPO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_gpu(*words):
    """A Python program in a process of its own, which sees the GPU; its output."""
    path = os.pathsep.join([str(tiny.REPOSITORY), str(tiny.REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tiny.REPOSITORY, env=environment, text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_update(figures):
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["optimizer/grad_norm"] > 0
    assert figures["policy/first_ratio_min"] == pytest.approx(1, abs=0.02)
    assert figures["policy/first_ratio_max"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_ppo_update_begins_with_a_ratio_of_one_and_without_divergence(precision, tmp_path, demos):
    stage = PPO(ppo_runs.config(tmp_path / "run", demos, precision=precision), resume=False, overwrite=False)
    assert {p.device.type for p in stage.models.engine.module.parameters()} == {"cuda"}
    figures = stage.update(0)
    check_update(figures)
    assert abs(figures["objective/kl"]) < 0.02
    assert stage.update(1)["objective/kl_k3"] > 0
    assert figures["memory/peak_gb"] > 0


@pytest.mark.parametrize("step", ["eager", "cuda_graph"])
@pytest.mark.parametrize("batch_size", [64, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family, batch_size, step):
    on_cpu, end, _ = by_generate(family)
    model = copy.deepcopy(on_cpu).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt], device="cuda"), **options)[0, len(prompt) :].tolist()
        expected.append(ids[: ids.index(end) + 1] if end in ids else ids)
    sampling = SamplingParams(24, temperature=0, batch_size=batch_size)
    found = hf(model, PROMPTS, [0] * len(expected), sampling, chat_like(end), step=step)
    assert [answer.ids for answer in found] == expected


def test_log_probs_and_gradients_are_those_of_the_cpu():
    ids = torch.randint(3, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    mask, wanted = torch.ones_like(ids), torch.arange(40).expand(4, 40) >= 20
    results = []
    for device in ("cpu", "cuda"):
        model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama()).to(device)
        found = token_logprobs(model, ids.to(device), mask.to(device), wanted.to(device), 0.7, chunks=3)
        (found[0].sum() + found[1].sum()).backward()
        results.append([*found, *(p.grad for p in model.parameters())])
    for here, there in zip(*results):
        torch.testing.assert_close(there.detach().cpu(), here.detach(), atol=1e-3, rtol=1e-3)


def test_one_process_joins_an_nccl_group():
    program = """
import torch, torch.distributed as dist
from rlhf import distributed
distributed.start(60, deepspeed_alone=True)
assert dist.get_backend() == "nccl", dist.get_backend()
total = torch.full((3,), 2.0, device=distributed.device())
dist.all_reduce(total)
assert total.tolist() == [2.0] * 3
distributed.stop()
"""
    on_gpu("-c", program)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_ppo_runs_under_zero_on_one_gpu(stage, precision, tmp_path, demos):
    function = {"reward": ppo_runs.REWARD, "critic": {"init": "policy"}, "updates": 2}
    file = write_config(tmp_path / "ppo", demos, "", **function)
    on_gpu(
        "-m", "stages.ppo", "--config", str(file), f"deepspeed=configs/deepspeed/{stage}.json", f"precision={precision}"
    )
    rows = updates(file.parent / "run")
    assert len(rows) == 2
    for figures in rows:
        check_update(figures)


def test_ppo_trains_adapters_over_a_base_in_4_bits(tmp_path, demos):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    c = ppo_runs.config(tmp_path / "run", demos, tuning={"name": "qlora", "rank": 4}, precision="bfloat16")
    stage = PPO(c, resume=False, overwrite=False)
    assert not stage.models.frozen
    check_update(stage.update(0))


def test_packed_demonstrations_train_as_those_that_stand_alone(tmp_path, demos):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = {"path": tiny.llama(), "attn_implementation": "flash_attention_2"}
    batch = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 4}
    values = sft_runs.settings(
        demos, tmp_path / "run", model=model, batch={**batch, "packing": True}, precision="bfloat16"
    )
    losses = sft_runs.losses(sft_runs.run(values))
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
