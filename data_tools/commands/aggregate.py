"""`rlhf data aggregate`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.aggregate import dataset as aggregating
from data_tools.aggregate.methods import AGGREGATORS
from data_tools.commands.common import DatasetPath, Json, Out, Overwrite
from data_tools.importers.run import read_options
from rlhf.core.console import print_json

METHODS = "; ".join(
    f"{row.name} ({', '.join(row.options.model_fields) or 'no options'}): {row.summary.rstrip('.')}"
    for row in AGGREGATORS
)


def aggregate_command(
    path: DatasetPath,
    out: Out,
    method: Annotated[str, typer.Option(help=METHODS)],
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge several annotators' rankings of a prompt into one, with a confidence as its weight."""
    summary = aggregating.aggregate_dataset(path, out, method, read_options(None, option or ()), overwrite)
    aggregating.show(summary)
    if as_json:
        print_json(summary)
