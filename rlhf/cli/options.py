"""Command-line options that several commands share, one meaning and one help text each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.core.errors import UserError, blame
from rlhf.core.files import write_text

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="A YAML file; configs/ has some to copy.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's: seed=1 log.every=10."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete an existing run of that name first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the config; load nothing.")]
Processes = Annotated[
    int | None,
    typer.Option("--num-processes", min=1, help="Number of processes to start here (with --hostfile: on each host)."),
]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", help="Start processes on the hosts in this file: lines `HOST slots=N`.")
]

Model = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a model folder, or a hub name.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message for conversations without one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model. Read that code first.")
]
Split = Annotated[
    str | None,
    typer.Option(help="train, eval or test. When left out: eval, or everything where the dataset has no splits."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Most records, from the first on.")]
Reward = Annotated[
    str | None,
    typer.Option(
        metavar="RUN|MODULE:FUNCTION|FILE|{...}",
        help="Scorer of the answers: a reward run or model, a function, or a reward source as in a PPO config.",
    ),
]
Positive = Annotated[int, typer.Option(min=1)]
PositiveOrNone = Annotated[int | None, typer.Option(min=1)]
NotNegative = Annotated[int, typer.Option(min=0)]
Out = Annotated[Path | None, typer.Option("--out")]
JsonLines = Annotated[bool, typer.Option("--json")]
ReplaceDataset = Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset of that name.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object in the last line.")]


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that were given on the command line and would be ignored.

    Args:
        context: The command's context.
        names: Names of parameters, such as `max_new_tokens`.
        why: The rest of the sentence, such as `is for policies`.

    Raises:
        UserError: One of them was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{max(parameter.opts, key=len)}: {why}", remedy="Leave it out.")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; see `write_whole`."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as a file of JSON lines; see `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a hidden name, flush it, rename it: never a half file.

    Raises:
        UserError: It cannot be written.
    """
    with blame(f"{path}: cannot be written"):
        write_text(path, text)
