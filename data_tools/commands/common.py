"""Options and output that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="The dataset folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset of that name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")]
DatasetPath = Annotated[Path, typer.Argument(metavar="DATASET", help="A dataset folder or a .jsonl file.")]
