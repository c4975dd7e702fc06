"""`rlhf data validate`, `stats`, `lineage`, and the commands that make a dataset from datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.commands.common import DatasetPath, Json, Out, Overwrite, report
from data_tools.curate import dedup as deduping
from data_tools.curate import filter as filtering
from data_tools.curate import lineage as tracing
from data_tools.curate import mix as mixing
from data_tools.curate import splits as splitting
from data_tools.curate import stats as counting
from data_tools.curate import validate as validating
from rlhf.core import console

Near = Annotated[
    float | None,
    typer.Option(metavar="THRESHOLD", help="Treat texts of this similarity as equal too: 0.5 to 1, such as 0.8."),
]


def validate_command(path: DatasetPath, *, as_json: Json = False) -> None:
    """Check every row, stored id and shard of a dataset. Exit status 1 if anything is bad."""
    summary = validating.validate(path, on_fault=console.say)
    report(summary, validating.show, as_json)
    if not summary["ok"]:
        raise typer.Exit(1)


def filter_command(
    path: DatasetPath,
    *,
    out: Out,
    where: str | None = None,
    tokenizer: str | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keep the records for which an expression is true, or whose length is within limits.

    Args:
        where (EXPR): Keep the records for which this is true, such as 'k > 2'.
        tokenizer: A model's folder, whose tokenizer counts tokens.
        min_tokens: Fewest tokens of the prompt with the longest answer.
        max_tokens: Most tokens of the prompt with the longest answer.
    """
    summary = filtering.filter_dataset(
        path, out, where=where, tokenizer=tokenizer, min_tokens=min_tokens, max_tokens=max_tokens, overwrite=overwrite
    )
    report(summary, filtering.show, as_json)


def dedup_command(
    path: DatasetPath,
    *,
    out: Out,
    by: str = "record",
    near: Near = None,
    keep: str = "first",
    against: list[Path] | None = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Keep one record of each group of duplicates, and no prompt of an evaluation set.

    Args:
        by: What duplicates share: record, prompt, or answers.
        keep: Which duplicate stays: first, or best (highest weight).
        against (DATASET): Leave out prompts that are in it; may be repeated.
    """
    summary = deduping.dedup_dataset(path, out, by=by, near=near, keep=keep, against=against or (), overwrite=overwrite)
    report(summary, deduping.show, as_json)


def split_command(
    path: DatasetPath,
    *,
    out: Out,
    by: str = "prompt",
    fractions: str | None = None,
    hold_out: list[str] | None = None,
    seed: int = 0,
    near: Near = None,
    together: Annotated[list[Path] | None, typer.Option("--with")] = None,
    allow_empty: bool = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a copy with every record in a split: the same prompt is in the same split in every dataset.

    Args:
        by: What is kept in one split: prompt or group.
        fractions: Fractions, by default train=0.8,eval=0.1,test=0.1; with --hold-out train=1.
        hold_out (GROUP): A group for eval, with --by group; may be repeated.
        seed: Datasets that are used together need the same seed.
        together (DATASET): A dataset used with this one, for --near; may be repeated.
        allow_empty: Accept a split without records.
    """
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
    report(summary, splitting.show, as_json)


def mix_command(
    parts: list[str],
    *,
    out: Out,
    cap: list[str] | None = None,
    size: int | None = None,
    seed: int = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Sample several datasets into one, by weights and caps. No record is repeated.

    Args:
        parts (DATASET[=WEIGHT]): Datasets of one kind.
        cap (DATASET=COUNT): Most records of a dataset; may be repeated.
        size: Records in the result; default: all that the weights allow.
        seed: Seed of the sample.
    """
    summary = mixing.mix_datasets(parts, out, caps=cap or (), size=size, seed=seed, overwrite=overwrite)
    report(summary, mixing.show, as_json)


def lineage_command(path: DatasetPath, *, as_json: Json = False) -> None:
    """Show what a dataset was made from, and whether that is still there and unchanged."""
    report(tracing.lineage(path), tracing.show, as_json)


def stats_command(paths: list[Path], *, as_json: Json = False) -> None:
    """Count what datasets hold: splits, sources, annotators, K, ties, lengths, duplicates, leaks between splits.

    Args:
        paths (PATH): Datasets that are counted together.
    """
    report(counting.stats(paths), counting.show, as_json)
