"""`rlhf data label-studio push` and `pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.annotate import label_studio
from data_tools.commands.common import Candidates, Json, Out, Overwrite, Positive, report
from rlhf.core.lazy_group import command_group

Url = Annotated[str, typer.Option("--url", help=f"Address of the server; its key is read from {label_studio.KEY}.")]
Project = Annotated[
    int | None, typer.Option(help="The project's number; by default the project that was made for these candidates.")
]


def push_command(
    candidates: Candidates,
    *,
    url: Url,
    project: Project = None,
    title: str | None = None,
    ties: bool = False,
    annotators: Positive = 1,
    as_json: Json = False,
) -> None:
    """Make or update a project for ranking the proposals. Answers do not say who wrote them.

    Args:
        title: Title of a new project.
        ties: Let several answers share a place.
        annotators: How many people rank each task.
    """
    summary = label_studio.push(candidates, url, project=project, title=title, ties=ties, annotators=annotators)
    report(summary, label_studio.show_push, as_json)


def pull_command(
    candidates: Candidates,
    *,
    url: Url,
    out: Out,
    project: Project = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pull the rankings. A dataset of an earlier pull is replaced, and what is new or changed is counted."""
    summary = label_studio.pull(candidates, url, out, project=project, overwrite=overwrite)
    report(summary, label_studio.show_pull, as_json)


app = command_group(
    "label-studio",
    "Push proposals to Label Studio, pull the rankings.",
    {
        "push": (f"{__name__}:push_command", "Make or update a project for ranking the proposals."),
        "pull": (f"{__name__}:pull_command", "Pull the rankings."),
    },
)
