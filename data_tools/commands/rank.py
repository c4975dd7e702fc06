"""`rlhf data rank`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.annotate import terminal as ranking
from data_tools.commands.common import Json
from rlhf.core.console import print_json


def rank_command(
    candidates: Annotated[Path, typer.Argument(metavar="CANDIDATES", help="A dataset of proposals.")],
    annotator: Annotated[str, typer.Option(metavar="NAME", help="Name of the person who ranks, kept in the rankings.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The JSONL file; by default rankings-NAME.jsonl next to CANDIDATES.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank proposals at the terminal, such as 2 > 1 = 4 > 3. Each ranking is saved at once; rerun to continue."""
    summary = ranking.rank(candidates, annotator, out)
    if as_json:
        print_json(summary)
