"""`rlhf data tasks` and `families`."""

from __future__ import annotations

from pathlib import Path

from data_tools.commands.common import Json, Out, Overwrite, Strict
from data_tools.importers.run import unusable_shown
from data_tools.tasks import families as having
from data_tools.tasks import make as making
from rlhf.core import console
from rlhf.core.console import print_json


def tasks_command(
    paths: list[str],
    *,
    out: Out,
    family: str | None = None,
    templates: Path | None = None,
    field: list[str] | None = None,
    choices: str | None = None,
    task: str | None = None,
    template: list[str] | None = None,
    all_templates: bool = False,
    shots: int = 0,
    cot: str = "auto",
    seed: int = 0,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn labelled rows into demonstrations through templates, as FLAN does.

    Args:
        paths (ROWS): Files of labelled rows: CSV, JSON or Parquet.
        family: The family of templates; see `rlhf data families`.
        templates: A YAML file of your own templates instead.
        field (FIELD=COLUMN): The column of a field, or {{ an expression }}; may be repeated.
        choices: The choices in label order, such as no,yes.
        task: Task of rows that name none; default: the file's name.
        template: Use this template only; may be repeated.
        all_templates: Use every template that fits.
        shots: Number of exemplars before each question.
        cot: Reasoning first: auto (where a row has it), never or both.
        seed: Seed of the choice of templates and exemplars.
    """
    options = making.Options(tuple(template or ()), all_templates, shots, cot, seed)
    with unusable_shown(as_json):
        summary = making.make_tasks(
            paths, out, family=family, templates=templates, fields=field or (), choices=choices, task=task,
            options=options, strict=strict, overwrite=overwrite,
        )  # fmt: skip
    summary.show()
    if as_json:
        print_json(summary.as_dict())


def families_command(name: str | None = None, *, as_json: Json = False) -> None:
    """List the families of tasks that have templates, or show one with its fields and templates.

    Args:
        name (FAMILY): Show this family with its templates.
    """
    found = [having.load_family(each) for each in (having.families() if name is None else [name])]
    if name is None:
        rows = [[each.name, ", ".join((*each.fields, *each.optional)), each.about] for each in found]
        console.table("families of tasks", ["family", "fields", "what they are"], rows)
    else:
        having.show(found[0])
    if as_json:
        print_json({"families": [having.as_dict(family) for family in found]})
