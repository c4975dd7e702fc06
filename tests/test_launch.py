"""Several processes: started from one command, named when they fail, over two hosts, under every DeepSpeed file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny

from rlhf.core.errors import UserError
from rlhf.distributed.launch import is_here, launch_on_hosts, read_hostfile

REPOSITORY = Path(__file__).resolve().parents[1]

BARE = """
import os, signal, sys, time
rank = os.environ["RANK"]
text = f"rank {rank} of {os.environ['WORLD_SIZE']} threads {os.environ['OMP_NUM_THREADS']} {sys.argv[1:]}\\n"
sys.stdout.write(text)  # in one piece, so that the ranks' lines do not mix
sys.stdout.flush()
if sys.argv[1:] == ["kill"] and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1:] == ["fail"] and rank == "1":
    sys.exit(3)
if sys.argv[1:]:
    time.sleep(600)
"""

LAUNCHER = """
import os, sys
from rlhf.cli.errors import exit_on_error
from rlhf.distributed.launch import launch
with exit_on_error("Continue with: this"):
    launch("toy", sys.argv[1:], int(os.environ.get("TOY_RANKS", "2")))
"""

STAGE = """
import os, signal, sys, time
import torch
from rlhf import distributed
from rlhf.cli.entry import main

def run(config, resume=False, overwrite=False):
    torch.set_num_threads(1)
    distributed.start(config.timeout_seconds)
    me = distributed.rank()
    total = distributed.all_sum(torch.tensor([10.0 ** me]))
    sys.stdout.write(f"rank {me} sum {total.item()} steps {config.batch.max_steps}\\n")
    if os.environ.get("TOY") == "kill" and me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TOY") == "raise" and me == 1:
        raise ValueError("a fault of rank one")
    if os.environ.get("TOY") == f"stop {me}":
        os.kill(os.getpid(), signal.SIGSTOP)
    if os.environ.get("TOY"):
        distributed.all_sum(torch.ones(1))
        time.sleep(600)

if __name__ == "__main__":
    main("sft")
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    ours = {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]), "CUDA_VISIBLE_DEVICES": "", **more}
    return {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **ours}


def python(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def bare(tmp_path):
    """A folder with a module that needs nothing but its rank."""
    (tmp_path / "toy.py").write_text(BARE, "utf-8")
    return tmp_path


@pytest.fixture
def stage(tmp_path):
    """A folder with a module shaped like a stage, and a config for it."""
    (tmp_path / "toy.py").write_text(STAGE, "utf-8")
    data = tiny.write_demonstrations(tmp_path / "data", 8, 2)
    (tmp_path / "toy.yaml").write_text(
        f"run: runs/toy\nmodel: {{path: org/name}}\ndata: {{train: {data}}}\ntimeout_seconds: 240\n", "utf-8"
    )
    return tmp_path


# ---- one machine -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_rank_gets_the_arguments_and_its_share_of_the_cores(bare):
    done = python(bare, "-c", LAUNCHER)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 threads {threads} []" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("word", "how"), [("kill", "was killed by SIGKILL"), ("fail", "ended with exit status 3")])
def test_a_rank_that_fails_is_named_with_its_host_and_how_and_the_others_are_stopped(bare, word, how):
    begun = time.monotonic()
    done = python(bare, "-c", LAUNCHER, word)
    assert done.returncode == 2
    assert f"error: rank 1 of 2 on {os.uname().nodename} (pid " in done.stderr and how in done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert ("out of memory" in done.stderr) == (word == "kill")
    assert time.monotonic() - begun < 300  # rank 0 would have slept for ten minutes


@pytest.mark.slow
def test_ctrl_c_ends_the_ranks_and_says_how_to_continue(bare):
    command = [sys.executable, "-c", LAUNCHER, "sleep"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=bare, env=environment(bare), stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert sum(line.startswith("rank") for line in seen) == 2
    assert process.returncode == 130
    assert "Interrupted. Continue with: this" in errors


@pytest.mark.slow
def test_a_stage_runs_on_two_processes_from_one_command(stage):
    words = ("--config", "toy.yaml", "batch.max_steps=7")
    done = python(stage, "-c", LAUNCHER, *words)
    assert done.returncode == 0, done.stderr
    assert "rank 0 sum 11.0 steps 7" in done.stdout and "rank 1 sum 11.0 steps 7" in done.stdout
    assert "Plan" not in done.stdout  # the launcher's command has shown it


@pytest.mark.slow
def test_the_traceback_of_another_rank_is_prefixed_with_the_rank(stage):
    done = python(stage, "-c", LAUNCHER, "--config", "toy.yaml", TOY="raise")
    assert done.returncode == 2
    assert "[rank 1] ValueError: a fault of rank one" in done.stderr
    assert "rank 1 of 2" in done.stderr


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "toy"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-c", LAUNCHER], TORCHRUN], ids=["rlhf", "torchrun"])
def test_ranks_end_with_a_launcher_that_is_killed(stage, words):
    command = [sys.executable, *words, "--config", "toy.yaml"]
    ours = environment(stage, TOY="sleep", OMP_NUM_THREADS="1")
    with subprocess.Popen(command, cwd=stage, env=ours, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        summed = (line for line in launcher.stdout if "sum 11.0" in line)
        next(summed), next(summed)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        assert len(ranks) >= 2
        launcher.kill()
        _, alive = psutil.wait_procs(ranks, timeout=120)
        assert not alive


CHILD = """
import time
from rlhf.distributed.launch import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""

PARENT_OF_CHILD = """
import os, subprocess, sys
from rlhf.distributed.launch import PARENT_PID
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, PARENT_PID: str(os.getpid() + int(sys.argv[2]))})
"""


def test_a_stage_ends_with_a_pipeline_that_is_killed(tmp_path):
    command = [sys.executable, "-c", PARENT_OF_CHILD, CHILD, "0"]
    with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 1
        parent.kill()
        _, alive = psutil.wait_procs(children, timeout=120)
        assert not alive


def test_a_stage_whose_pipeline_ended_before_it_began_does_not_start(tmp_path):
    done = python(tmp_path, "-c", PARENT_OF_CHILD, CHILD, "1")  # the process id of no parent
    assert "ready" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_after_the_timeout_and_not_taken_for_out_of_memory(stage, stopped):
    other = 1 - stopped
    words = ("--config", "toy.yaml", "timeout_seconds=5")
    done = python(stage, "-c", LAUNCHER, *words, TOY=f"stop {stopped}")
    assert done.returncode == 2
    assert f"rank {other} lost contact with rank {stopped} (host " in done.stderr
    assert f"error: rank {other} of 2 on {os.uname().nodename} (pid " in done.stderr
    assert f"Rank {stopped} of 2 did not end on SIGTERM and was killed by the launcher" in " ".join(done.stderr.split())
    assert "out of memory" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_survivor_without_a_launcher_says_which_rank_is_gone(stage):
    def rank(number: int) -> subprocess.Popen[str]:
        ours = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOY": "kill"}
        command = [sys.executable, "-m", "toy", "--config", "toy.yaml"]
        return subprocess.Popen(command, cwd=stage, env=environment(stage, **ours), stderr=subprocess.PIPE, text=True)

    port = tiny.free_port()
    ranks = [rank(0), rank(1)]
    _, errors = ranks[0].communicate(timeout=360)
    ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 2, errors
    assert f"rank 0 lost contact with rank 1 (host {os.uname().nodename})" in errors and "--resume" in errors


@pytest.mark.slow
def test_one_stopped_rank_of_four_is_named_and_the_waiting_ones_are_not(stage):
    words = ["--config", "toy.yaml", "timeout_seconds=8"]
    done = python(stage, "-c", LAUNCHER, *words, TOY="stop 2", TOY_RANKS="4")
    assert done.returncode == 2
    named = re.findall(r"rank \d lost contact with (.*)", done.stderr)
    assert named and all(text == f"rank 2 (host {os.uname().nodename})" for text in named), done.stderr
    assert "Rank 2 of 4 did not end on SIGTERM and was killed by the launcher" in " ".join(done.stderr.split())


# ---- several hosts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# all\n\none slots=2\ntwo", r"hosts:4: 'two' is not of the form"),
        ("one slots=0", "not of the form"),
        ("one slots=2\none slots=2", r"hosts:2: .* names a host twice"),
    ],
)
def test_a_faulty_hostfile_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_counts_the_processes_of_each_host(tmp_path):
    (tmp_path / "hosts").write_text("# ours\none slots=4\ntwo slots=2 # small\n", "utf-8")
    assert read_hostfile(tmp_path / "hosts") == {"one": 4, "two": 2}
    assert read_hostfile(tmp_path / "hosts", 3) == {"one": 3, "two": 2}
    assert not is_here({"one": 4}) and is_here({"localhost": 4}) and not is_here({"localhost": 1, "one": 1})


def test_other_hosts_without_pdsh_are_refused_with_another_way(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n", "utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pdsh is not installed"):
        launch_on_hosts("toy", [], tmp_path / "hosts", None)


PDSH = """#!/bin/bash
# Stands in for pdsh: runs the command here, once for each of the comma-separated hosts, with %n as their number.
while [ $# -gt 0 ]; do case "$1" in -w) hosts="$2"; shift 2;; -f) shift 2;; -S) shift;; *) break;; esac; done
number=0; status=0; pids=""
for host in ${hosts//,/ }; do bash -c "${*//%n/$number}" & pids="$pids $!"; number=$((number + 1)); done
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""


@pytest.mark.slow
def test_deepspeeds_launcher_runs_the_stage_on_the_hosts_of_a_file(stage):
    """With pdsh and ssh replaced by programs that run their command on this machine."""
    (stage / "pdsh").write_text(PDSH, "utf-8")
    (stage / "ssh").write_text('#!/bin/bash\necho 127.0.0.1 "$@" >/dev/null\nhostname -I >/dev/null; echo 127.0.0.1\n')
    for name in ("pdsh", "ssh"):
        (stage / name).chmod(0o755)
    (stage / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n", "utf-8")
    words = '["--config", "toy.yaml", "batch.max_steps=7"]'
    code = f"from rlhf.distributed.launch import launch_on_hosts; launch_on_hosts('toy', {words}, 'hosts', None)"
    done = python(stage, "-c", code, PATH=f"{stage}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "rank 0 sum 11.0 steps 7" in done.stdout and "rank 1 sum 11.0 steps 7" in done.stdout


@pytest.mark.slow
def test_two_hosts_train_together_under_torchrun(stage, two_hosts):
    pipe, port = subprocess.PIPE, tiny.free_port()
    hosts = []
    for number, (name, device) in enumerate(two_hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node_rank", str(number), "--nproc_per_node", "1", "--master_addr", "10.77.9.1"]
        command += ["--master_port", str(port), "-m", "toy", "--config", "toy.yaml"]
        ours = environment(stage, GLOO_SOCKET_IFNAME=device, OMP_NUM_THREADS="1")
        hosts.append(subprocess.Popen(command, cwd=stage, env=ours, stdout=pipe, stderr=pipe, text=True))
    for number, host in enumerate(hosts):
        output, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors
        assert f"rank {number} sum 11.0" in output


# ---- DeepSpeed files ---------------------------------------------------------------------------------------------

ZERO = """
import json, sys
import torch
from rlhf import distributed
from rlhf.distributed.deepspeed_json import read_deepspeed

torch.set_num_threads(1)
distributed.start(240)
import deepspeed

def train(path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inputs, wanted = torch.randn(8, 6), torch.randn(8, 1)
    rank, world = distributed.rank(), distributed.world_size()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if path is None:
        forward, backward = net, lambda loss: loss.backward()
    else:
        settings = read_deepspeed(path) | {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}}
        weights = list(net.parameters())
        engine, *_ = deepspeed.initialize(model=net, model_parameters=weights, optimizer=optimizer, config=settings)
        stage = read_deepspeed(path)["zero_optimization"]["stage"]
        assert engine.zero_optimization_stage() == stage and world == 2
        forward, backward = engine, engine.backward
    losses = []
    for _ in range(4):
        if path is None:
            loss = ((forward(inputs) - wanted) ** 2).mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            backward(loss)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        else:
            loss = ((forward(inputs[rank::world]) - wanted[rank::world]) ** 2).mean()
            losses.append(distributed.all_sum(loss.detach() / world).item())
            backward(loss)
            engine.step()
    return losses

found = [train(None)] + [train(path) for path in sys.argv[1:]]
if distributed.rank() == 0:
    print("FOUND", json.dumps(found))
distributed.stop()
"""


@pytest.mark.slow
def test_every_deepspeed_file_trains_two_processes_as_plain_torch_trains_one():
    files = sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json"))
    done = tiny.launch(2, ZERO, *map(str, files))
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    assert line, done.stdout
    plain, *others = json.loads(line[6:])
    assert len(others) == len(files) == 6
    for file, losses in zip(files, others):
        assert losses == pytest.approx(plain, rel=2e-4), file.name  # DeepSpeed's clipping adds 1e-6 to the norm
