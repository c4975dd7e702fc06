"""`rlhf data validate`, `split` and `stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools import splits as splitting
from data_tools import stats as counting
from data_tools import validate as validating
from data_tools.commands.common import DatasetPath, Json, Out, print_json
from rlhf import console


def validate_command(path: DatasetPath, as_json: Json = False) -> None:
    """Check every row, stored id and shard of a dataset. Exit status 1 if anything is bad."""
    summary = validating.validate(path, on_fault=console.say)
    validating.show(summary)
    if as_json:
        print_json(summary)
    if not summary["ok"]:
        raise typer.Exit(1)


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
        print_json(summary)


def stats_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Datasets, counted together.")],
    as_json: Json = False,
) -> None:
    """Count what datasets hold: splits, sources, annotators, K, ties, lengths, duplicates, leaks between splits."""
    found = counting.stats(paths)
    counting.show(found)
    if as_json:
        print_json(found)
