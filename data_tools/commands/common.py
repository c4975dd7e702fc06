"""Options and output that the commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.core.console import print_json

Out = Annotated[Path, typer.Option("--out", help="The dataset folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset of that name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")]
DatasetPath = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset folder or a .jsonl file.")]
Candidates = Annotated[Path, typer.Argument(metavar="CANDIDATES", help="A dataset of proposals.")]
Positive = Annotated[int, typer.Option(min=1)]


def report(found: dict[str, Any], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Print what a command found, and with --json the whole of it on the last line."""
    show(found)
    if as_json:
        print_json(found)
