"""`rlhf data import`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.commands.common import Json, Out, print_json
from data_tools.importers import IMPORTERS
from data_tools.ingest import NothingUsable, import_dataset

FORMATS = "; ".join(f"{row.name}: {row.summary.rstrip('.')}" for row in IMPORTERS)


def import_command(
    importer: Annotated[str, typer.Argument(metavar="FORMAT", help=FORMATS)],
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Files, folders, or quoted glob patterns.")],
    out: Out,
    split_name: Annotated[str | None, typer.Option(help="Put every record in this split: train, eval or test.")] = None,
    source: Annotated[str | None, typer.Option(help="Give every record this source.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    as_json: Json = False,
) -> None:
    """Import files of one format into a dataset. Rows that cannot be used go to OUT/rejected.jsonl, by reason."""
    try:
        summary = import_dataset(importer, paths, out, split=split_name, source=source, strict=strict)
    except NothingUsable as error:
        error.summary.show()
        if as_json:
            print_json(error.summary.as_dict())
        raise
    summary.show()
    if as_json:
        print_json(summary.as_dict())
