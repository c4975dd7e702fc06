"""What the processes that a run starts in addition to its ranks have in common: samplers, servers, commands."""

from __future__ import annotations

import os

from rlhf.distributed.launch import PARENT_PID

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that is no rank of the run, and ends with this one (`launch.end_with_parent`)."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return kept | {PARENT_PID: str(os.getpid())} | more


def how_it_ended(status: int) -> str:
    """An exit status in words; -N means that signal N killed the process."""
    if status >= 0:
        return f"ended with exit status {status}"
    memory = " (usually out of memory: see `dmesg`)" if status == -9 else ""
    return f"was killed by signal {-status}{memory}"
