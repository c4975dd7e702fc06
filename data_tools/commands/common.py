"""Options and output that the commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.core import console

Out = Annotated[Path, typer.Option("--out", help="The dataset folder to make.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
DatasetPath = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset folder or a .jsonl file.")]


def print_json(value: dict[str, Any]) -> None:
    """Print the object on one line, on the main process."""
    if console.is_main():
        print(json.dumps(value, ensure_ascii=False), flush=True)
