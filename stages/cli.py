"""The command `rlhf`. Only options are defined here; heavy imports wait until everything has been checked."""

from __future__ import annotations

import importlib
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from data_tools.commands.cli import app as data_app
from rlhf import __version__
from rlhf.cli import entry
from rlhf.cli.entry import ConfigFile, DryRun, Overrides, Overwrite, Resume
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.distributed.launch import launch, launch_on_hosts, read_hostfile
from stages import chat, demo, evaluate, export, pipeline, propose, sample
from stages import memory as plan

app = typer.Typer(
    name="rlhf", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="RLHF from human rankings: instruction tuning, a reward model on K-way rankings, PPO.",
)  # fmt: skip

Processes = Annotated[
    int | None,
    typer.Option("--num-processes", min=1, help="Start so many processes here (with --hostfile: on each host)."),
]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", help="Start processes on the hosts of this file: lines `HOST slots=N`.")
]


def _training(stage: str, summary: str) -> None:
    """Add the command of a stage."""

    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        num_processes: Processes = None,
        hostfile: Hostfile = None,
    ) -> None:
        words, more = ["--config", str(config), *(overrides or ())], _launch_words(num_processes, hostfile)
        with entry.exit_on_error(entry.resume_line(shlex.join(["rlhf", stage, *words, *more, "--resume"]))):
            count = _count(num_processes, hostfile)
            checked = entry.prepare(stage, config, overrides or (), resume, overwrite, dry_run, count)
            if checked is None:
                return
            if hostfile is None and count is None:
                entry.run(importlib.import_module(f"stages.{stage}").run, checked, resume, overwrite)
                return
            words += ["--resume"] * resume + ["--overwrite"] * overwrite
            if hostfile is not None:
                launch_on_hosts(f"stages.{stage}", words, hostfile, num_processes)
            else:
                launch(f"stages.{stage}", words, count or 1)

    app.command(stage, help=summary)(command)


def _count(processes: int | None, hostfile: Path | None) -> int | None:
    """How many processes are to be started; None for this one alone, or the launcher's that we are under."""
    count = processes
    if hostfile is not None:
        count = sum(read_hostfile(hostfile, processes).values())
    if count is not None and "RANK" in os.environ:
        raise UserError(
            "--num-processes: this process was started by a launcher already",
            remedy="Leave the option out, or start `rlhf` without the launcher.",
        )
    return None if count == 1 and hostfile is None else count


def _launch_words(processes: int | None, hostfile: Path | None) -> list[str]:
    words = ["--num-processes", str(processes)] if processes else []
    return [*words, "--hostfile", str(hostfile)] if hostfile else words


_training("sft", "Stage 1: instruction tuning on demonstrations.")
_training("reward", "Stage 2: a reward model from rankings of K answers.")
_training("ppo", "Stage 3: PPO against the reward, with a KL penalty.")


@app.command(
    "pipeline", help="The stages and the export in a row, in rounds with people's rankings; exit status 3: it waits."
)
def pipeline_command(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="name=..., rounds.size=..., or a stage's: ppo.updates=3."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Skip complete runs and continue others; or refuse both.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the runs of those names first.")] = False,
    dry_run: DryRun = False,
    num_processes: Processes = None,
    hostfile: Hostfile = None,
) -> None:
    words, more = ["--config", str(config), *(overrides or ())], _launch_words(num_processes, hostfile)
    with entry.exit_on_error(entry.resume_line(shlex.join(["rlhf", "pipeline", *words, *more]))):
        count = _count(num_processes, hostfile)
        if not pipeline.run(config, overrides or (), resume, overwrite, dry_run, count, more):
            raise typer.Exit(pipeline.WAITING)


app.command("plan")(plan.command)
app.command("sample")(sample.command)
app.command("evaluate")(evaluate.command)
app.command("export")(export.command)
app.command("chat")(chat.command)
app.command("demo")(demo.command)
data_app.command("propose")(propose.command)  # needs models, so it is none of the data tools
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        say(f"rlhf {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script `rlhf`; never returns."""
    with entry.exit_on_error():
        app(prog_name="rlhf")


if __name__ == "__main__":
    main()
