"""`rlhf data ...`: import, validate, split, stats. With --json the last line printed is one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools import splits as splitting
from data_tools import stats as counting
from data_tools import validate as validating
from data_tools.importers import IMPORTERS
from data_tools.ingest import NothingUsable, import_dataset
from rlhf import console

app = typer.Typer(name="data", help="Turn what you have into datasets of the schema.", no_args_is_help=True)

FORMATS = "; ".join(f"{row.name}: {row.summary.rstrip('.')}" for row in IMPORTERS)

Out = Annotated[Path, typer.Option("--out", help="The dataset folder to make.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object in the last line.")]
DatasetPath = Annotated[Path, typer.Argument(metavar="PATH", help="A dataset folder or a .jsonl file.")]


def _print_json(value: dict[str, Any]) -> None:
    if console.is_main():
        print(json.dumps(value, ensure_ascii=False), flush=True)


@app.command("import")
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
            _print_json(error.summary.as_dict())
        raise
    summary.show()
    if as_json:
        _print_json(summary.as_dict())


@app.command("validate")
def validate_command(path: DatasetPath, as_json: Json = False) -> None:
    """Check every row, stored id and shard of a dataset. Exit status 1 if anything is bad."""
    summary = validating.validate(path, on_fault=console.say)
    validating.show(summary)
    if as_json:
        _print_json(summary)
    if not summary["ok"]:
        raise typer.Exit(1)


@app.command("split")
def split_command(
    path: DatasetPath,
    out: Out,
    by: Annotated[str, typer.Option(help="prompt or group.")] = "prompt",
    fractions: Annotated[
        str | None, typer.Option(help="Such as train=0.8,eval=0.1,test=0.1 (the default; with --hold-out: train=1).")
    ] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="A group of eval, with --by group; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Datasets that are used together need the same seed.")] = 0,
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="Accept a split without records.")] = False,
    as_json: Json = False,
) -> None:
    """Write a dataset anew with every record in a split: the same prompt in the same split, in every dataset."""
    shares = None if fractions is None else splitting.parse_fractions(fractions)
    summary = splitting.split_dataset(
        path, out, by=by, fractions=shares, hold_out=hold_out or (), seed=seed, allow_empty=allow_empty
    )
    splitting.show(summary)
    if as_json:
        _print_json(summary)


@app.command("stats")
def stats_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Datasets, counted together.")],
    as_json: Json = False,
) -> None:
    """Count what datasets hold: splits, sources, annotators, K, ties, lengths, duplicates, leaks between splits."""
    found = counting.stats(paths)
    counting.show(found)
    if as_json:
        _print_json(found)
