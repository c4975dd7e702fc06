"""`rlhf data import` and `rlhf data formats`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.check.brief import show_brief
from data_tools.commands.common import Json, Out, Overwrite, Strict
from data_tools.importers import IMPORTERS
from data_tools.importers.run import import_dataset, read_options, unusable_shown
from data_tools.importers.table import AUTO
from data_tools.statistics.accumulator import Accumulator
from rlhf.core import console
from rlhf.core.console import print_json
from rlhf.core.errors import UserError
from rlhf.core.table import TableRow

FORMAT = f"{AUTO}, or: {', '.join(row.name for row in IMPORTERS)}. `rlhf data formats` shows a sample of each."


def import_command(
    importer: Annotated[str, typer.Argument(metavar="FORMAT", help=FORMAT)],
    paths: list[str],
    *,
    out: Out,
    option: list[str] | None = None,
    options: Path | None = None,
    split_name: str | None = None,
    source: str | None = None,
    ignore: list[str] | None = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import files of one format into a dataset. Rows that cannot be used go to OUT/rejected.jsonl with the reason.

    Args:
        paths (PATH): Files, folders, or quoted glob patterns.
        option (NAME=VALUE): An option of the format, such as a column; may be repeated.
        options: A YAML file of such options; a dataset's import.yaml repeats its import.
        split_name: Put every record in this split: train, eval or test.
        source: Give every record this source.
        ignore (FIELD): A field of the rows that does not matter; may be repeated.
    """
    given = read_options(options, option or ())
    gathered = Accumulator()
    with unusable_shown(as_json):
        summary = import_dataset(
            importer, paths, out, options=given, split=split_name, source=source, strict=strict,
            ignored_fields=ignore or (), overwrite=overwrite, gathered=gathered,
        )  # fmt: skip
    summary.show()
    show_brief(gathered, out)
    if as_json:
        print_json(summary.as_dict())


def formats_command(name: str | None = None, *, as_json: Json = False) -> None:
    """List the formats that `import` reads, with a line and a sample each; or show one in full.

    Args:
        name ([FORMAT]): Show everything about this format.
    """
    try:
        rows = list(IMPORTERS) if name is None else [IMPORTERS[name]]
    except ValueError as error:
        raise UserError(str(error)) from None
    if name is None:
        for row in rows:
            console.say(row.name, style="bold")
            console.say(f"  {row.summary}")
            console.say(f"  {_short(row.traits['sample'])}", style="dim")
        console.say("`rlhf data formats FORMAT` shows how ranks are read, and the options.")
    else:
        _show(rows[0])
    if as_json:
        print_json({row.name: _facts(row) for row in rows})


def _short(sample: str) -> str:
    line = " ".join(sample.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def _facts(row: TableRow) -> dict[str, Any]:
    options = {
        name: {"type": str(field.annotation), "default": None if field.is_required() else field.default}
        for name, field in row.options.model_fields.items()
    }
    return {
        "summary": row.summary,
        "suffixes": row.traits["suffixes"],
        "sample": row.traits["sample"],
        "options": options,
    }


def _show(row: TableRow) -> None:
    console.say(row.name, style="bold")
    console.say(inspect.getdoc(row.fn) or "")
    console.say(f"\nFiles of a folder: {' '.join(row.traits['suffixes'])}")
    fields = row.options.model_fields
    if fields:
        shown = [[name, "required" if field.is_required() else repr(field.default)] for name, field in fields.items()]
        console.table("options (--option NAME=VALUE)", ["name", "default"], shown)
    console.say("Sample:")
    console.say(row.traits["sample"].rstrip(), style="dim")
