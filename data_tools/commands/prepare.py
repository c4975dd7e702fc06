"""`rlhf data validate`, `stats`, `lineage`, and the commands that make a dataset from datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.commands.common import DatasetPath, Json, Out, Overwrite
from data_tools.curate import dedup as deduping
from data_tools.curate import filter as filtering
from data_tools.curate import lineage as tracing
from data_tools.curate import mix as mixing
from data_tools.curate import splits as splitting
from data_tools.curate import stats as counting
from data_tools.curate import validate as validating
from rlhf.core import console
from rlhf.core.console import print_json

Near = Annotated[
    float | None,
    typer.Option(metavar="THRESHOLD", help="Treat texts of this similarity as equal too: 0.5 to 1, such as 0.8."),
]


def validate_command(path: DatasetPath, as_json: Json = False) -> None:
    """Check every row, stored id and shard of a dataset. Exit status 1 if anything is bad."""
    summary = validating.validate(path, on_fault=console.say)
    validating.show(summary)
    if as_json:
        print_json(summary)
    if not summary["ok"]:
        raise typer.Exit(1)


def filter_command(
    path: DatasetPath,
    out: Out,
    where: Annotated[
        str | None, typer.Option(metavar="EXPR", help="Keep the records for which this is true, such as 'k > 2'.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A model's folder, whose tokenizer counts tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of the prompt with the longest answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the prompt with the longest answer.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keep the records for which an expression is true, or whose length is within limits."""
    summary = filtering.filter_dataset(
        path, out, where=where, tokenizer=tokenizer, min_tokens=min_tokens, max_tokens=max_tokens, overwrite=overwrite
    )
    filtering.show(summary)
    if as_json:
        print_json(summary)


def dedup_command(
    path: DatasetPath,
    out: Out,
    by: Annotated[str, typer.Option(help="What duplicates share: record, prompt, or answers.")] = ("record"),
    near: Near = None,
    keep: Annotated[str, typer.Option(help="Which duplicate stays: first, or best (highest weight).")] = "first",
    against: Annotated[
        list[Path] | None, typer.Option(metavar="DATASET", help="Leave out prompts that are in it; may be repeated.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keep one record of each group of duplicates, and no prompt of an evaluation set."""
    summary = deduping.dedup_dataset(path, out, by=by, near=near, keep=keep, against=against or (), overwrite=overwrite)
    deduping.show(summary)
    if as_json:
        print_json(summary)


def split_command(
    path: DatasetPath,
    out: Out,
    by: Annotated[str, typer.Option(help="What is kept in one split: prompt or group.")] = "prompt",
    fractions: Annotated[
        str | None, typer.Option(help="Fractions, by default train=0.8,eval=0.1,test=0.1; with --hold-out train=1.")
    ] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="A group for eval, with --by group; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Datasets that are used together need the same seed.")] = 0,
    near: Near = None,
    together: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="DATASET", help="A dataset used with this one, for --near; may be repeated."),
    ] = None,
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="Accept a split without records.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a copy with every record in a split: the same prompt is in the same split in every dataset."""
    summary = splitting.split_dataset(
        path,
        out,
        by=by,
        fractions=None if fractions is None else splitting.parse_fractions(fractions),
        hold_out=hold_out or (),
        seed=seed,
        near=near,
        together=together or (),
        allow_empty=allow_empty,
        overwrite=overwrite,
    )
    splitting.show(summary)
    if as_json:
        print_json(summary)


def mix_command(
    parts: Annotated[list[str], typer.Argument(metavar="DATASET[=WEIGHT]", help="Datasets of one kind.")],
    out: Out,
    cap: Annotated[
        list[str] | None,
        typer.Option(metavar="DATASET=COUNT", help="Most records of a dataset; may be repeated."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Records in the result; default: all that the weights allow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Sample several datasets into one, by weights and caps. No record is repeated."""
    summary = mixing.mix_datasets(parts, out, caps=cap or (), size=size, seed=seed, overwrite=overwrite)
    mixing.show(summary)
    if as_json:
        print_json(summary)


def lineage_command(path: DatasetPath, as_json: Json = False) -> None:
    """Show what a dataset was made from, and whether that is still there and unchanged."""
    found = tracing.lineage(path)
    tracing.show(found)
    if as_json:
        print_json(found)


def stats_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Datasets that are counted together.")],
    as_json: Json = False,
) -> None:
    """Count what datasets hold: splits, sources, annotators, K, ties, lengths, duplicates, leaks between splits."""
    found = counting.stats(paths)
    counting.show(found)
    if as_json:
        print_json(found)
