"""The table of importers, and `auto`: which of them reads a file, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.reading.rows import rows
from rlhf.core.errors import UserError
from rlhf.core.table import Table
from rlhf.data.jsonl import READ_ERRORS, OnReject, Reject, open_bytes
from rlhf.data.schema import BadRecord, Prompt, Record

IMPORTERS = Table("format")


class Head(NamedTuple):
    """The beginning of a file, from which `auto` recognises its format."""

    path: Path
    text: str
    """The first 4,096 characters."""
    rows: list[Any]
    """The values of the first rows, at most 20; none where the file is neither JSON nor Parquet."""

    def all_have(self, *fields: str) -> bool:
        """Whether there are rows, and each is an object with these fields."""
        return bool(self.rows) and all(isinstance(row, dict) and row.keys() >= set(fields) for row in self.rows)


def convert_rows(
    path: Path, reject: OnReject, convert: Callable[[Any], Record | Iterable[Record | BadRecord]]
) -> Iterator[Record]:
    """Records from the rows of a file.

    Args:
        convert: Gives the record of one row, or raises BadRecord. For a row of several records (a task with several
            annotations), it gives an iterable of records and BadRecords, each BadRecord one that cannot be used.
    """
    for line, raw, value in rows(path, reject):
        try:
            made = convert(value)
            if isinstance(made, Prompt):
                yield made
                continue
            for record in made:
                if isinstance(record, BadRecord):
                    reject(Reject.of(path, line, record, raw))
                else:
                    yield record
        except BadRecord as fault:
            reject(Reject.of(path, line, fault, raw))


AUTO = "auto"


def read_head(path: Path) -> Head:
    """The beginning of a file.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        with open_bytes(path) as file:
            text = file.read(4096).decode("utf-8-sig", "replace")
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {error}", remedy="Download the file again.") from None
    structured = text.lstrip().startswith(("[", "{", "PAR1"))
    first = islice(rows(path, lambda _: None), 20) if structured else ()
    return Head(path, text, [item.value for item in first])


def detect(files: Sequence[Path]) -> tuple[str, str]:
    """The format of the files, and why: the end of the sentence "it is FORMAT because ...".

    Raises:
        UserError: No format fits, several do, or the files are of different formats.
    """
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        name, why = _one(file)
        found.setdefault(name, (file, why))
    if len(found) > 1:
        reasons = "; ".join(f"{file} is {name} because {why}" for name, (file, why) in found.items())
        raise UserError(
            f"auto: the files are of different formats: {reasons}", remedy="Import each format to its own --out."
        )
    ((name, (_, why)),) = found.items()
    return name, why


def _one(file: Path) -> tuple[str, str]:
    head = read_head(file)
    fits = {row.name: why for row in IMPORTERS if (why := row.traits["detect"](head))}
    if len(fits) == 1:
        return next(iter(fits.items()))
    if fits:
        reasons = "; ".join(f"{name}, because {why}" for name, why in fits.items())
        raise UserError(f"{file}: auto: several formats fit: {reasons}", remedy="Name one of them in place of `auto`.")
    row = head.rows[0] if head.rows else None
    seen = f"its first row has the fields {', '.join(map(repr, list(row)[:12]))}" if isinstance(row, dict) else (
        f"it begins with {head.text[:60]!r}"
    )  # fmt: skip
    raise UserError(
        f"{file}: auto: no format is recognised",
        f"Here {seen}.",
        "Name the format in place of `auto`; `rlhf data formats` shows a sample of each.",
    )
