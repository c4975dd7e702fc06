"""benchmarks/gpu.sh: its arithmetic is right, and its small CPU mode runs, so that it works once there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM

sys.path.append(str(tiny.REPOSITORY / "benchmarks"))
from gpu_arithmetic import PHASES, Shape, measurements, setting_for, table

SHAPE = Shape(layers=3, width=32, heads=4, inner=80, vocab=96)
SIDE = {"updates": [], "episodes": 4, "loaded_gb": 1.0}


def opt():
    config = OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, ffn_dim=80, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM._from_config(config, attn_implementation="eager").eval()


def test_the_operations_are_those_that_torch_counts():
    ids = torch.randint(3, 90, (4, 10))
    with FlopCounterMode(display=False) as forward:
        loss = opt()(ids).logits.sum()
    # eager attention computes the whole square, which is causal attention over twice the length
    assert forward.get_total_flops() == SHAPE.forward_flops(tokens=40, length=20, head_tokens=40)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_bytes_of_decoding_are_the_weights_once_a_step_and_every_key_and_value():
    setting = replace(setting_for(0, 1.0), policy=SHAPE)
    weights = sum(p.numel() for name, p in opt().named_parameters() if p.dim() == 2 and "positions" not in name)
    assert setting.decode_bytes(steps=1, columns=0, element=2) == 2 * weights
    # two steps of two rows that hold 5 and then 6 tokens
    read = setting.decode_bytes(steps=2, columns=22, element=2)
    assert read == 2 * 2 * weights + 22 * 2 * 32 * 3 * 2


def test_the_large_setting_is_deepspeed_chats():
    setting = setting_for(150_000_000_000, 790e12)
    assert (setting.prompt_tokens, setting.new_tokens, setting.episodes) == (256, 256, 1024)
    assert setting.policy.linear + setting.policy.head == pytest.approx(1.3e9, rel=0.02)
    assert setting.critic.linear + setting.critic.head == pytest.approx(350e6, rel=0.02)
    smaller = setting_for(24_000_000_000, 100e12)
    assert 1 <= smaller.batch_size < setting.batch_size
    assert smaller.micro_batch_tokens < setting.micro_batch_tokens
    assert smaller.episodes < setting.episodes


def test_the_first_update_warms_up_and_shares_are_of_what_was_measured():
    setting = setting_for(0, 1.0)
    update = {
        "phases": {"rollout": 2.0, "score": 1.0, "learn": 4.0},
        "seconds": 8.0,
        "peak_gb": dict.fromkeys(PHASES, 2.0),
    }
    slow = update | {"seconds": 99.0}
    counts = {"prefill_seconds": 0.5, "decode_steps": 15, "decode_columns": 1000}
    limits = {"flops": 1e9, "bytes": 1e9, "sheet_flops": 2e9}
    ours = measurements(SIDE | {"updates": [slow | counts, update | counts]}, setting, limits, 4)
    assert ours["seconds an update"] == 8.0 and ours["updates measured"] == 1
    assert ours["hours for 131,900 prompts"] == pytest.approx(131_900 / 4 * 8 / 3600)
    assert ours["answer tokens/s in rollout"] == 4 * 16 / 2
    assert ours["fraction of the matrix rate in learn"] == pytest.approx(setting.update_flops(4)["learn"] / 4e9)
    assert ours["the same, of the data sheet's matrix rate"] * 2 == ours["fraction of the matrix rate in learn"]
    assert ours["the same, of the data sheet's bandwidth"] is None
    moved = setting.decode_bytes(15, 1000, 4)
    assert ours["fraction of the bandwidth limit in decoding"] == pytest.approx(moved / 1.5 / 1e9)
    theirs = measurements(SIDE | {"updates": [update]}, setting, limits, 4)
    assert theirs["fraction of the bandwidth limit in decoding"] is None
    assert "| seconds an update | 8.00 | 8.00 |" in table({"ours": ours, "TRL": theirs})


@pytest.mark.slow
def test_the_small_mode_runs_by_one_command_and_measures_every_phase(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = ["bash", "benchmarks/gpu.sh", "--trl", str(tmp_path / "absent")]
    done = subprocess.run(
        command, cwd=tiny.REPOSITORY, env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "absent holds no package trl" in done.stdout
    assert "Check: PPO update in " in done.stdout and "first ratio 1.0000 to 1.0000" in done.stdout
    assert "| hours for 131,900 prompts |" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    ours = found["sides"]["ours"]
    assert all(value > 0 for name, value in ours.items() if "data sheet" not in name)
    assert all(0 < value < 1 for name, value in ours.items() if name.startswith("share"))
    for update in found["raw"]["ours"]["updates"]:
        assert update["ratio"] == [1.0, 1.0]
        assert update["decode_steps"] == 15 and update["decode_columns"] == sum(8 * (16 + i) for i in range(1, 16))
    assert found["raw"]["ours"]["updates"][0]["kl"] == 0.0


@pytest.mark.slow
def test_a_profile_names_the_operations_of_each_phase(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/gpu.sh", "--profile", "--out", str(tmp_path)]
    subprocess.run(command, cwd=tiny.REPOSITORY, env=environment, check=True, timeout=300)
    found = {phase: (tmp_path / f"profile-{phase}.txt").read_text() for phase in PHASES}
    assert all("aten::addmm" in text for text in found.values())
    assert "AdamW" in found["learn"] and "AdamW" not in found["score"]


@pytest.mark.slow
def test_a_python_without_the_packages_is_told_what_it_lacks_and_how_to_bring_it(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    environment = {**os.environ, "PYTHON": str(tmp_path / "bare/bin/python"), "PYTHONPATH": "", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["bash", str(copy_of_the_script(tmp_path))], env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "bare/bin/python lacks: packaging" in done.stdout and "--pack" in done.stdout


def copy_of_the_script(folder):
    """In a folder of its own, where there is no .gpu/ and none will be made next to the repository."""
    (folder / "benchmarks").mkdir()
    (folder / "pyproject.toml").write_text((tiny.REPOSITORY / "pyproject.toml").read_text())
    script = folder / "benchmarks" / "gpu.sh"
    script.write_text((tiny.REPOSITORY / "benchmarks" / "gpu.sh").read_text())
    return script
