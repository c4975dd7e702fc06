"""`rlhf data label-studio push` and `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.annotate import label_studio
from data_tools.commands.common import Json, Out, Overwrite
from rlhf.core.console import print_json
from rlhf.core.lazy_group import OPTIONS

HELP = "Push proposals to Label Studio, pull the rankings."
app = typer.Typer(name="label-studio", help=HELP, no_args_is_help=True, **OPTIONS)

Candidates = Annotated[Path, typer.Argument(metavar="CANDIDATES", help="A dataset of proposals.")]
Url = Annotated[str, typer.Option("--url", help=f"Address of the server; its key is read from {label_studio.KEY}.")]
Project = Annotated[
    int | None, typer.Option(help="The project's number; by default the project that was made for these candidates.")
]


@app.command("push")
def push_command(
    candidates: Candidates,
    url: Url,
    project: Project = None,
    title: Annotated[str | None, typer.Option(help="Title of a new project.")] = None,
    ties: Annotated[bool, typer.Option("--ties", help="Let several answers share a place.")] = False,
    annotators: Annotated[int, typer.Option(min=1, help="How many people rank each task.")] = 1,
    as_json: Json = False,
) -> None:
    """Make or update a project for ranking the proposals. Answers do not say who wrote them."""
    summary = label_studio.push(candidates, url, project=project, title=title, ties=ties, annotators=annotators)
    label_studio.show_push(summary)
    if as_json:
        print_json(summary)


@app.command("pull")
def pull_command(
    candidates: Candidates,
    url: Url,
    out: Out,
    project: Project = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pull the rankings. A dataset of an earlier pull is replaced, and what is new or changed is counted."""
    summary = label_studio.pull(candidates, url, out, project=project, overwrite=overwrite)
    label_studio.show_pull(summary)
    if as_json:
        print_json(summary)
