"""PPO over two hosts whose network fails in the middle: both ends say so, and the run continues bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from logged import lines
from ppo_processes import complete, environment, write_config

pytestmark = pytest.mark.slow
TIMEOUT = 15
"""Seconds after which a collective gives up."""


def started(hosts, file: Path, *words: str) -> list[subprocess.Popen[str]]:
    """One torchrun in each network namespace."""
    found, port = [], tiny.free_port()
    for number, (name, device) in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node_rank", str(number), "--nproc_per_node", "1", "--master_addr", "10.77.9.1"]
        command += ["--master_port", str(port), "-m", "stages.ppo", "--config", str(file), *words]
        ours = environment() | {"GLOO_SOCKET_IFNAME": device}
        pipe = subprocess.PIPE
        found.append(subprocess.Popen(command, cwd=tiny.REPOSITORY, env=ours, text=True, stdout=pipe, stderr=pipe))
    return found


def test_a_cut_link_ends_both_hosts_and_the_run_continues(two_hosts, prompts, tmp_path):
    settings = {"deepspeed": str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json"), "updates": 6}
    settings |= {"reward": {"name": "function", "function": "ppo_rewards:letters"}, "critic": {"init": "policy"}}
    settings |= {"eval": {"every": 6, "prompts": 3}, "timeout_seconds": TIMEOUT}
    whole, cut = (write_config(tmp_path / name, prompts, None, **settings) for name in ("whole", "cut"))
    complete(2, whole)
    link = ["ip", "netns", "exec", two_hosts[0][0], "ip", "link", "set", two_hosts[0][1]]
    hosts = started(two_hosts, cut)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "cut" / "run" / "checkpoints" / "step-00000001").is_dir():
            assert all(host.poll() is None for host in hosts) and time.monotonic() < deadline
            time.sleep(0.01)
        subprocess.run([*link, "down"], check=True)
        errors = [host.communicate(timeout=300)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert all(host.returncode for host in hosts), errors
    assert "rank 0 lost contact with rank 1" in errors[0] and "rank 1 lost contact with rank 0" in errors[1]
    subprocess.run([*link, "up"], check=True)
    for host in started(two_hosts, cut, "--resume"):
        output, problems = host.communicate(timeout=300)
        assert host.returncode == 0, output + problems
    assert lines(tmp_path / "cut" / "run") == lines(tmp_path / "whole" / "run")
