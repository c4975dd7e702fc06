"""`rlhf data tasks` and `families`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.commands.common import Json, Out, Overwrite, Strict
from data_tools.importers.run import unusable_shown
from data_tools.tasks import families as having
from data_tools.tasks import make as making
from rlhf.core import console
from rlhf.core.console import print_json


def tasks_command(
    paths: Annotated[list[str], typer.Argument(metavar="ROWS", help="Files of labelled rows: CSV, JSON or Parquet.")],
    out: Out,
    family: Annotated[str | None, typer.Option(help="The family of templates; see `rlhf data families`.")] = None,
    templates: Annotated[Path | None, typer.Option(help="A YAML file of your own templates instead.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=COLUMN", help="The column of a field, or {{ an expression }}; may be repeated."),
    ] = None,
    choices: Annotated[str | None, typer.Option(help="The choices in label order, such as no,yes.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of rows that name none; default: the file's name.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="Use this template only; may be repeated.")] = None,
    all_templates: Annotated[bool, typer.Option("--all-templates", help="Use every template that fits.")] = False,
    shots: Annotated[int, typer.Option(help="Number of exemplars before each question.")] = 0,
    cot: Annotated[str, typer.Option(help="Reasoning first: auto (where a row has it), never or both.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the choice of templates and exemplars.")] = 0,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn labelled rows into demonstrations through templates, as FLAN does."""
    options = making.Options(tuple(template or ()), all_templates, shots, cot, seed)
    with unusable_shown(as_json):
        summary = making.make_tasks(
            paths, out, family=family, templates=templates, fields=field or (), choices=choices, task=task,
            options=options, strict=strict, overwrite=overwrite,
        )  # fmt: skip
    summary.show()
    if as_json:
        print_json(summary.as_dict())


def families_command(
    name: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Show this family with its templates.")] = None,
    as_json: Json = False,
) -> None:
    """List the families of tasks that have templates, or show one with its fields and templates."""
    found = [having.load_family(each) for each in (having.families() if name is None else [name])]
    if name is None:
        rows = [[each.name, ", ".join((*each.fields, *each.optional)), each.about] for each in found]
        console.table("families of tasks", ["family", "fields", "what they are"], rows)
    else:
        having.show(found[0])
    if as_json:
        print_json({"families": [having.as_dict(family) for family in found]})
