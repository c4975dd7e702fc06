"""From a command line to a running stage: read the config, check everything, print the checks, run.

`rlhf sft` and `python -m stages.sft` (under torchrun, deepspeed or accelerate) both come through here.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from rlhf import distributed
from rlhf.cli.compare_config import CompareConfig
from rlhf.cli.errors import exit_on_error, resume_line
from rlhf.cli.options import ConfigFile, DryRun, Overrides, Overwrite, Resume
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.cli.preflight import PendingRuns, check
from rlhf.cli.stage_configs import TRAINING
from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config, fits, load_stage_config, read_values
from rlhf.core.console import say, table
from rlhf.core.errors import UserError
from rlhf.core.lazy_group import command_app
from rlhf.distributed.launch import PARENT, end_with_parent, read_hostfile
from rlhf.runs.run import is_complete

LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


def main(stage: str) -> None:
    """The command line of `python -m stages.STAGE`; never returns."""

    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        local_rank: LocalRank = 0,  # added by the deepspeed launcher; LOCAL_RANK in the environment is what we read
    ) -> None:
        with exit_on_error(resume_line(None)):
            checked = prepare(stage, config, overrides or (), resume, overwrite, dry_run)
            if checked is not None:
                run(stage_function(), checked, resume, overwrite)

    end_with_parent()
    command_app(command, help=f"Run the {stage} stage in this process, one of several under a launcher.")()


def stage_function() -> Callable[..., None]:
    """`run` of the module that `python -m` was given.

    The module is imported under its own name, so that what it defines is the same to pickle as with `rlhf STAGE`.
    """
    this = sys.modules["__main__"]
    module = importlib.import_module(this.__spec__.name) if this.__spec__ else this
    return module.run


def prepare(
    stage: str,
    file: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    processes: int | None = None,
    pending_runs: PendingRuns | None = None,
) -> StageConfig | None:
    """Read and check a stage's config and print the checks; None if there is nothing to run.

    The arguments are those of `rlhf.cli.preflight.check`.

    Raises:
        UserError: A fault that can be found without loading weights.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite: one continues the run, the other deletes it", remedy="Choose one.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # reward functions are found in the working folder, however we were started
    refuse_other_stage(stage, file)
    config = load_stage_config(TRAINING[stage], file, overrides)
    rows = check(stage, config, resume, overwrite, processes, pending_runs)
    if dry_run:
        from rlhf.cli.dry_run import share_rows, template_rows  # slow: they load the tokenizer, and torch

        rows += share_rows(config, processes or distributed.world_size(), pending_runs)
        rows += template_rows(config, pending_runs)
        say(dump_config(config).rstrip())
    if os.environ.get(PARENT) != "launcher":
        table(f"Preflight: {stage}", ("what", "how"), rows)
    if dry_run:
        return None
    if resume and is_complete(config):
        say(f"{config.run} is complete: there is nothing to continue")
        return None
    return config


def refuse_other_stage(stage: str, file: str | Path) -> None:
    """Refuse a config file that is invalid for this stage, but valid for another stage or a pipeline.

    Raises:
        UserError: Names the stage that the file is for, and its command.
    """
    values = read_values(file)
    kinds: dict[str, type[BaseModel]] = {**TRAINING, "pipeline": PipelineConfig, "compare": CompareConfig}
    fitting = [name for name, kind in kinds.items() if fits(kind, values)]
    if fitting and stage not in fitting:
        names = " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))
        raise UserError(
            f"{file}: is a config of {names}, not of {stage}",
            remedy=f"Start it with: rlhf {fitting[0]} --config {file}",
        )


def run(function: Callable[..., None], config: Any, resume: bool, overwrite: bool) -> None:
    """Run a stage's `run` and leave the process group."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others and warns
    # DeepSpeed calls these by their old names thousands of times, and torch warns each time.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    distributed.name_lost_ranks(function)(config, resume=resume, overwrite=overwrite)
    distributed.stop()


def process_count(processes: int | None, hostfile: Path | None) -> int | None:
    """How many processes to start; None if the stage runs in this process (one process, or a rank of a launcher).

    Raises:
        UserError: Processes are to be started from inside a launcher, or the host file has a fault.
    """
    count = processes
    if hostfile is not None:
        count = sum(read_hostfile(hostfile, processes).values())
    if count is not None and "RANK" in os.environ:
        raise UserError(
            "--num-processes: this process was started by a launcher already",
            remedy="Leave the option out, or start `rlhf` without the launcher.",
        )
    return None if count == 1 and hostfile is None else count


def launch_words(processes: int | None, hostfile: Path | None) -> list[str]:
    """`--num-processes` and `--hostfile` as words of a command."""
    words = ["--num-processes", str(processes)] if processes else []
    return [*words, "--hostfile", str(hostfile)] if hostfile else words
