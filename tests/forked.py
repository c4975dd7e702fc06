"""Ranks forked from a process that has imported what they import: two of them start in a second instead of ten.

Commands that a user types go through torchrun, and the tests of those do too; this is for programs of the tests' own.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

IMPORTED = [
    "torch", "torch.distributed", "transformers.models.llama.modeling_llama", "trl", "peft", "datasets", "deepspeed",
    "stages.sft", "stages.reward", "stages.dpo", "stages.ppo",
]  # fmt: skip


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Started by the first rank; what it imports, all ranks have. It has the environment that it was started in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run(
    script: Path, words: tuple[str, ...], folder: Path, environments: list[dict[str, str]], timeout: float
) -> tuple[int, str]:
    """Run a program in a folder, as one process for each environment.

    As under torchrun the first that fails takes the others with it.

    Returns:
        The first exit status that is not 0, or 0, and what all of them wrote.

    Raises:
        TimeoutError: They ran longer than `timeout` seconds; what they wrote is the message.
    """
    output = script.with_suffix(".out")
    output.touch()
    start = _server().Process
    ranks = [start(target=_rank, args=(script, words, folder, environment, output)) for environment in environments]
    for rank in ranks:
        rank.start()
    until, failed = time.monotonic() + timeout, 0
    while (left := [rank for rank in ranks if rank.exitcode is None]) and time.monotonic() < until:
        wait([rank.sentinel for rank in left], timeout=max(0.0, until - time.monotonic()))
        failed = failed or next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        if failed:
            until = min(until, time.monotonic() + 5)  # for the others to say what they saw
    for rank in left:
        rank.kill()
        rank.join()
    text = output.read_text("utf-8", "replace")
    if left and not failed:
        raise TimeoutError(f"after {timeout} s:\n{text}")
    return failed, text


def _rank(script: Path, words: tuple[str, ...], folder: Path, environment: dict[str, str], output: Path) -> None:
    """What a rank does: as `python script words` in that environment, its output added to the file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(script), *words]
    status = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
