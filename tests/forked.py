"""Ranks forked from a process that has imported what they import: two of them start in a second instead of ten.

Commands that a user types start a new Python or go through torchrun, and some tests do as they do; this is for programs
of the tests' own, and for runs whose start is not what a test is about.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

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


class Ranks:
    """A program that runs in a folder, as one process for each environment, with `words` as its arguments."""

    def __init__(self, script: Path, words: tuple[str, ...], folder: Path, environments: list[dict[str, str]]) -> None:
        self._output = script.with_suffix(".out")
        self._output.touch()
        start = _server().Process
        arguments = [(script, words, folder, environment, self._output) for environment in environments]
        self._ranks: list[Any] = [start(target=_rank, args=given) for given in arguments]
        for rank in self._ranks:
            rank.start()

    @property
    def text(self) -> str:
        """What all of them wrote so far, to standard output and standard error."""
        return self._output.read_text("utf-8", "replace")

    def poll(self) -> int | None:
        """The first exit status that is not 0; else None while one of them runs, and 0 after that."""
        found = [rank.exitcode for rank in self._ranks]
        return next(filter(None, found), None if None in found else 0)

    def kill(self) -> None:
        """End those that still run, by SIGKILL."""
        for rank in self._ranks:
            rank.kill()
            rank.join()

    def wait(self, timeout: float) -> int:
        """Wait for the end. As under torchrun the first that fails takes the others with it.

        Returns:
            The first exit status that is not 0, or 0.

        Raises:
            TimeoutError: They ran longer than `timeout` seconds; what they wrote is the message.
        """
        until, failed = time.monotonic() + timeout, 0
        while (left := [r for r in self._ranks if r.exitcode is None]) and time.monotonic() < until:
            wait([rank.sentinel for rank in left], timeout=max(0.0, until - time.monotonic()))
            failed = failed or self.poll() or 0
            if failed:
                until = min(until, time.monotonic() + 5)  # for the others to say what they saw
        self.kill()
        if left and not failed:
            raise TimeoutError(f"after {timeout} s:\n{self.text}")
        return failed


def _rank(script: Path, words: tuple[str, ...], folder: Path, environment: dict[str, str], output: Path) -> None:
    """What a rank does: as `python script words` in that environment, its output added to the file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _spare_time()
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


def _spare_time() -> None:
    """Leave out what conftest.py leaves out in the tests' own process.

    That is the predicted memory, most of a tiny run's time, the wait for the disk, and the search of what was imported
    for garbage.
    """
    from rlhf.memory import peak

    peak._predicted = lambda *_: "not in tests"  # type: ignore[assignment]
    os.fsync = lambda handle: None
    gc.freeze()
