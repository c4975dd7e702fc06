"""Start processes: ranks with torch's elastic launcher on this machine, with DeepSpeed's on several hosts; others."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.core.console import say
from rlhf.core.errors import SIGTERM_STATUS, Terminated, UserError
from rlhf.distributed.process_group import free_port

PARENT = "RLHF_PARENT"
"""Set by the parent process of a stage: a `launcher` prints the checks and how to resume, a `pipeline` prints only
how to resume."""

PARENT_PID = "RLHF_PARENT_PID"
"""Set with PARENT: the process id of the parent, for `end_with_parent`."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent ends."""

STUCK_SECONDS = 15
"""A SIGKILL that comes this much later than the first failure is the launcher's own, which waits for 30 s."""


def launch(module: str, arguments: Sequence[str], processes: int) -> None:
    """Run `python -m MODULE ARGUMENTS` as this many ranks on this machine, on a free port, and wait for them.

    Raises:
        UserError: More processes than GPUs, or a rank failed or was killed; says which rank, how, and where.
        KeyboardInterrupt: Ctrl-C was pressed, and the ranks have ended.
        Terminated: SIGTERM came, and the ranks have ended, in the middle of training with a checkpoint.
    """
    import psutil
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"--num-processes {processes}: this machine has {gpus} GPUs", "Every process needs its own GPU."
        )
    # torch logs a page about a failed rank; `_failure` says the same in three lines
    logging.disable(logging.CRITICAL)
    os.environ |= {PARENT: "launcher", PARENT_PID: str(os.getpid())}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )  # fmt: skip
    say(f"Starting {processes} processes ...")

    def forward(*_: Any) -> None:
        # torch's launcher would kill ranks 30 seconds after SIGTERM; a step and a checkpoint may take longer
        for child in psutil.Process().children():
            child.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        if {failure.exitcode for failure in error.failures.values()} <= {SIGTERM_STATUS, -signal.SIGTERM}:
            raise Terminated from None
        raise _failure(error.failures, processes) from None
    except SignalException as stopped:
        if stopped.sigval.name == "SIGINT":
            raise KeyboardInterrupt from None
        sys.exit(128 + stopped.sigval)
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Have the kernel kill this process when the launcher or pipeline that started it ends, however that ends.

    Else ranks would go on training in a run folder that the next start also writes to. Only on Linux. A process that
    was started by hand or by a scheduler is left alone: it may outlive its shell.
    """
    parent = os.environ.pop(PARENT_PID, None)  # removed, because it is wrong for processes that this one starts
    launchers = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}  # set by torchrun and by DeepSpeed's launcher
    if sys.platform != "linux" or not (parent or launchers & os.environ.keys()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != int(parent):
        os._exit(1)  # the parent ended before the line above


def _failure(failures: Mapping[int, Any], processes: int) -> UserError:
    """The error for failed ranks. Killed ranks come first, because the others fail when they lose contact with them."""

    def how(failure: Any) -> str:
        code = failure.exitcode
        return f"was killed by {failure.signal_name()}" if code < 0 else f"ended with exit status {code}"

    host = socket.gethostname()
    first = min(f.timestamp for f in failures.values())
    # After the first failure the launcher ends the remaining ranks with SIGTERM, and with SIGKILL those that are still
    # there after 30 seconds: neither is a cause.
    stuck = [r for r, f in failures.items() if f.signal_name() == "SIGKILL" and f.timestamp > first + STUCK_SECONDS]
    causes = {r: f for r, f in failures.items() if r not in stuck and f.signal_name() != "SIGTERM"} or dict(failures)
    causes = dict(sorted(causes.items(), key=lambda item: (item[1].exitcode >= 0, item[0])))
    faults = [f"rank {rank} of {processes} on {host} (pid {f.pid}) {how(f)}" for rank, f in causes.items()]
    memory = " SIGKILL usually means out of memory: see `dmesg`." if "SIGKILL" in faults[0] else ""
    ended = [
        f" Rank {rank} of {processes} did not end on SIGTERM and was killed by the launcher: it was stopped or stuck."
        for rank in stuck
    ]
    return UserError(
        "; ".join(faults),
        "The other ranks were stopped, because they cannot continue without it." + memory + "".join(ended),
        "See the ranks' own output above. Continue from the last checkpoint with --resume.",
    )


# ---- several hosts -----------------------------------------------------------------------------------------------


def read_hostfile(path: str | Path, processes: int | None = None) -> dict[str, int]:
    """Read host -> number of processes from lines `HOST slots=N`. Empty lines and # comments are skipped.

    Args:
        path: The file.
        processes: Upper limit for each host.

    Raises:
        UserError: No such file, no host in it, or an invalid line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--hostfile: no file {path}")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", entry)
        if not found or found[1] in hosts:
            fault = "names a host twice" if found else "is not of the form `HOST slots=N`"
            raise UserError(f"{path}:{number}: {entry!r} {fault}")
        hosts[found[1]] = min(int(found[2]), processes or int(found[2]))
    if not hosts:
        raise UserError(f"{path}: names no host", remedy="Write one line `HOST slots=N` for each host.")
    return hosts


def is_here(hosts: Mapping[str, int]) -> bool:
    """True if this machine is the only host."""
    return set(hosts) <= {"localhost", "127.0.0.1", socket.gethostname()} and len(hosts) == 1


def launch_on_hosts(module: str, arguments: Sequence[str], hostfile: str | Path, processes: int | None) -> None:
    """Run `python -m MODULE ARGUMENTS` on every host of the file with DeepSpeed's launcher (pdsh over ssh).

    The project, the working folder and the data must have the same paths on every host.

    Raises:
        UserError: pdsh is not installed, or a rank failed.
    """
    hosts = read_hostfile(hostfile, processes)
    if is_here(hosts):
        return launch(module, arguments, sum(hosts.values()))
    if shutil.which("pdsh") is None:
        raise UserError(
            "--hostfile: pdsh is not installed",
            "DeepSpeed's launcher uses it to start processes on the other hosts.",
            f"Install pdsh, or run on every host, with R = 0, 1, ...: torchrun --nnodes {len(hosts)} --node_rank R "
            f"--nproc_per_node {max(hosts.values())} --master_addr {next(iter(hosts))} --master_port 29500 -m {module}",
        )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    command += ["--num_gpus", str(processes)] if processes else []
    command += ["--master_port", str(free_port()), "--log_level", "warning", "--module", module, *arguments]
    say(f"Starting {sum(hosts.values())} processes on {', '.join(hosts)} ...")
    status = run_child(command, {**os.environ, PARENT: "launcher"})
    if status:
        raise UserError(
            f"a rank on one of {', '.join(hosts)} failed (the launcher ended with exit status {status})",
            "The other ranks were stopped, because they cannot continue without it.",
            "See the ranks' own output above. Continue from the last checkpoint with --resume.",
        )


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that is no rank of the run, and ends with this one (`end_with_parent`)."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return kept | {PARENT_PID: str(os.getpid())} | more


def how_it_ended(status: int) -> str:
    """An exit status in words; -N means that signal N killed the process."""
    if status >= 0:
        return f"ended with exit status {status}"
    memory = " (usually out of memory: see `dmesg`)" if status == -9 else ""
    return f"was killed by signal {-status}{memory}"


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command on our terminal and wait for it. Return its exit status; -N means that signal N killed it.

    Ctrl-C and SIGTERM end the child first, so that it never outlives this process.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and the child has ended.
    """
    with subprocess.Popen(command, env=environment) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        except KeyboardInterrupt:
            try:
                child.wait(timeout=5)  # the terminal sends Ctrl-C to the child too
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
