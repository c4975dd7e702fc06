"""`rlhf data annotators`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.check import leave_out as leaving
from data_tools.commands.common import DatasetPath, Json
from rlhf.core.console import print_json


def annotators_command(
    path: DatasetPath,
    most: Annotated[int, typer.Option(min=1, help="Leave out this many at most, those with the most rankings.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure what leaving each annotator out does to a small reward model, with intervals."""
    found = leaving.leave_out(path, most)
    leaving.show(found)
    if as_json:
        print_json(found)
