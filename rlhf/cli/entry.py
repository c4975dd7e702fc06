"""From a command line to a running stage: read the config, check everything, show the plan, run, tell what failed.

`rlhf sft` and `python -m stages.sft` (under torchrun, deepspeed or accelerate) both come through here.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf import distributed
from rlhf.cli.preflight import PendingRuns, check
from rlhf.cli.stage_configs import STAGES
from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config, load_stage_config
from rlhf.core.console import err, is_main, say, table
from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.distributed.launch import PARENT
from rlhf.runs.run import is_run, read_run

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="A YAML config, such as configs/0.5b/sft.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the file's: batch.max_steps=10 tuning=lora."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run of that name first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print config and plan, load nothing.")]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


def main(stage: str) -> None:
    """The command line of `python -m stages.STAGE`; never returns."""

    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        local_rank: LocalRank = 0,  # the deepspeed launcher adds it; the environment says the same
    ) -> None:
        del local_rank
        with exit_on_error(resume_line(None)):
            checked = prepare(stage, config, overrides or (), resume, overwrite, dry_run)
            if checked is not None:
                run(stage_function(), checked, resume, overwrite)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=f"Run the {stage} stage in this process, one of several under a launcher.")(command)
    app()


def stage_function() -> Callable[..., None]:
    """`run` of the module that `python -m` was given.

    The module is imported under its own name, so that what it defines is the same to pickle as with `rlhf STAGE`.
    """
    this = sys.modules["__main__"]
    module = importlib.import_module(this.__spec__.name) if this.__spec__ else this
    function: Callable[..., None] = module.run
    return function


def prepare(
    stage: str,
    file: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    processes: int | None = None,
    coming: PendingRuns | None = None,
) -> StageConfig | None:
    """Read and check a stage's config and show the plan; None where that was all. See `rlhf.cli.preflight.check`.

    Raises:
        UserError: Whatever can be found wrong without loading weights.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite: one continues the run, the other deletes it", remedy="Choose one.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # reward functions are found in the working folder, however we were started
    config = load_stage_config(STAGES[stage], file, overrides)
    plan = check(stage, config, resume, overwrite, processes, coming)
    if dry_run:
        say(dump_config(config).rstrip())
    if os.environ.get(PARENT) != "launcher":
        table(f"Plan: {stage}", ("what", "how"), plan)
    if dry_run:
        return None
    if resume and is_run(config.run) and read_run(config.run).get("status") == "complete":
        say(f"{config.run} is complete: there is nothing to continue")
        return None
    return config


def run(function: Callable[..., None], config: Any, resume: bool, overwrite: bool) -> None:
    """Run a stage's `run` and leave the process group."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others and warns
    # DeepSpeed calls these by their old names thousands of times, and torch warns each time.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    distributed.name_lost_ranks(function)(config, resume=resume, overwrite=overwrite)
    distributed.stop()


# ---- telling what failed -----------------------------------------------------------------------------------------


def resume_line(command: str | None) -> str | None:
    """How to go on after Ctrl-C; None where the process above says it."""
    if PARENT in os.environ:
        return None
    return f"Continue with: {command}" if command else "Continue with the same command and --resume."


@contextmanager
def exit_on_error(resume: str | None = None) -> Iterator[None]:
    """Errors inside end the process as a person expects.

    A UserError is printed without a traceback and exits with status 2. Ctrl-C prints `resume` and exits with 130.
    Anything else keeps its traceback; on ranks other than 0 every line of it is prefixed with the rank.
    """
    try:
        yield
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main() and resume:
            err().print(f"\nInterrupted. {resume}", markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception:
        if is_main():
            raise
        print_lines(traceback.format_exc())
        sys.exit(1)


def print_error(error: UserError) -> None:
    """What is wrong, why, and what to do, each on its own line of standard error."""
    labels = (("error: ", error.what), ("  why: ", error.why), ("  fix: ", error.remedy))
    print_lines("\n".join(label + text for label, text in labels if text), style="red")


def print_lines(text: str, style: str | None = None) -> None:
    """Print to standard error, each line prefixed with the rank unless this is rank 0."""
    prefix = "" if is_main() else f"[rank {distributed.rank()}] "
    for line in text.splitlines():
        err().print(prefix + line, style=style, markup=False, soft_wrap=True)
