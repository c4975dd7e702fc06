"""`rlhf sft`, `reward`, `dpo`, `ppo`, `specialist`: run a stage in this process, or start processes that run it."""

from __future__ import annotations

import gc
import importlib
import shlex
from collections.abc import Callable
from typing import Any

from rlhf.cli import entry
from rlhf.cli.errors import exit_on_error, resume_line
from rlhf.cli.options import ConfigFile, DryRun, Hostfile, Overrides, Overwrite, Processes, Resume
from rlhf.distributed.launch import launch, launch_on_hosts


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        num_processes: Processes = None,
        hostfile: Hostfile = None,
    ) -> None:
        words = ["--config", str(config), *(overrides or ())]
        again = ["rlhf", stage, *words, *entry.launch_words(num_processes, hostfile), "--resume"]
        with exit_on_error(resume_line(shlex.join(again))):
            count = entry.process_count(num_processes, hostfile)
            checked = entry.prepare(stage, config, overrides or (), resume, overwrite, dry_run, count)
            if checked is None:
                if dry_run and stage == "specialist":  # its rows are files, which only `check_rows` can check
                    _imported(stage).check_rows(config, overrides or ())
                return
            if hostfile is None and count is None:
                entry.run(_imported(stage).run, checked, resume, overwrite)
                return
            words += ["--resume"] * resume + ["--overwrite"] * overwrite
            if hostfile is not None:
                launch_on_hosts(f"stages.{stage}", words, hostfile, num_processes)
            else:
                launch(f"stages.{stage}", words, count or 1)

    return command


def _imported(stage: str) -> Any:
    """The stage's module. With garbage collection on, importing it and its libraries takes a second more."""
    gc.disable()
    module = importlib.import_module(f"stages.{stage}")
    gc.freeze()  # nor need later collections look through half a million objects that stay
    gc.enable()
    return module


sft = _stage_command("sft")
reward = _stage_command("reward")
dpo = _stage_command("dpo")
ppo = _stage_command("ppo")
specialist = _stage_command("specialist")
