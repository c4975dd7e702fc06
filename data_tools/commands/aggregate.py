"""`rlhf data aggregate`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.aggregate import dataset as aggregating
from data_tools.aggregate.methods import AGGREGATORS
from data_tools.commands.common import DatasetPath, Json, Out, Overwrite, report
from data_tools.importers.run import read_options

METHODS = "; ".join(
    f"{row.name} ({', '.join(row.options.model_fields) or 'no options'}): {row.summary.rstrip('.')}"
    for row in AGGREGATORS
)


def aggregate_command(
    path: DatasetPath,
    *,
    out: Out,
    method: Annotated[str, typer.Option(help=METHODS)],
    option: list[str] | None = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge several annotators' rankings of a prompt into one, with a confidence as its weight.

    Args:
        option (NAME=VALUE): An option of the method; may be repeated.
    """
    summary = aggregating.aggregate_dataset(path, out, method, read_options(None, option or ()), overwrite)
    report(summary, aggregating.show, as_json)
