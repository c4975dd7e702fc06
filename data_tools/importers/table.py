"""The table of importers, and `auto`: which of them reads a file, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from data_tools.reading.annotation_exports import brief
from data_tools.reading.cells import columns_of
from data_tools.reading.fields import without_nulls
from data_tools.reading.route import route
from data_tools.reading.rows import is_binary, rows
from data_tools.reading.turns import begins_with_mark, has_later_marks
from data_tools.reading.unread import NestedFields
from rlhf.core.errors import UserError
from rlhf.core.table import Table
from rlhf.data.columns import Row
from rlhf.data.jsonl import READ_ERRORS, Item, OnReject, Reject, open_bytes
from rlhf.data.schema import BadRecord, Demonstration, Prompt, Record

IMPORTERS = Table("format")


class Head(NamedTuple):
    """The beginning of a file, from which `auto` recognises its format."""

    path: Path
    text: str
    """The first 4,096 characters."""
    rows: list[Any]
    """The values of the first rows, at most 20; none where the file is none of JSON, Parquet and Arrow."""

    def all_have(self, *fields: str) -> bool:
        """Whether there are rows, and each is an object with these fields."""
        return bool(self.rows) and all(isinstance(row, dict) and row.keys() >= set(fields) for row in self.rows)


def convert_rows(
    path: Path,
    reject: OnReject,
    convert: Callable[[Any], Record | Iterable[Record | BadRecord]],
    left_out: Collection[str] = (),
    usual: Callable[[Any], Row | None] | None = None,
    read: Callable[[Path, OnReject], Iterator[Item]] = rows,
) -> Iterator[Any]:
    """Records from the rows of a file, and what `usual` gives. A field that is null is absent.

    A row is rejected where `convert` does not read a field that could matter, also in an object inside it
    (`NestedFields`).

    Args:
        convert: Gives the record of one row, or raises BadRecord. For a row of several records (a task with several
            annotations), it gives an iterable of records and BadRecords, each BadRecord one that cannot be used.
        left_out: Fields that the format's docstring says are left out.
        usual: Tried first, for speed: gives the ranking of a row that has no other fields than those it reads and needs
            none of the checks here, or None.
        read: Gives the rows of the file.
    """
    nested = NestedFields({*left_out, *getattr(reject, "ignored_fields", ())})

    def convert_whole(row: Any) -> list[Record | BadRecord]:
        converted = convert(row)
        return [converted] if isinstance(converted, Prompt) else list(converted)

    for line, raw, value in read(path, reject):
        if usual is not None and (ranking := usual(value)) is not None:
            yield ranking
            continue
        try:
            value = without_nulls(value) if (b"null" if isinstance(raw, bytes) else "null") in raw else value
            made, fault = nested.converted(convert_whole, value)
            if fault and any(isinstance(record, Prompt) for record in made):
                raise fault
        except BadRecord as error:
            reject(Reject.of(path, line, error, raw))
            continue
        for record in made:
            fault = record if isinstance(record, BadRecord) else _transcript_fault(record)
            if fault is None:
                yield record  # type: ignore[misc]  # no fault, so no BadRecord
            else:
                reject(Reject.of(path, line, fault, raw))


def importer_of(convert: Callable[..., Any], **traits: Any) -> Callable[..., Iterator[Record]]:
    """The importer of a format whose rows are converted one by one, with the converter's docstring and options.

    Args:
        traits: `left_out` and `read` of `convert_rows`.
    """

    @wraps(convert)
    def importer(path: Path, reject: OnReject, **options: Any) -> Iterator[Record]:
        return convert_rows(path, reject, partial(convert, **options), **traits)

    hints = get_type_hints(convert)  # the names in its annotations are those of its module
    options = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(convert).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("path", "reject")]
    importer.__signature__ = inspect.Signature([*first, *options])  # type: ignore[attr-defined]
    return importer


def _transcript_fault(record: Record) -> BadRecord | None:
    """The fault of a record whose prompt or answer holds the turns of a whole chat as one text."""
    said = [message.content for message in record.messages]
    if isinstance(record, Demonstration):
        said.append(record.answer)
    if not any(map(begins_with_mark, said)):  # a loop in C: every row of every import comes here
        return None
    marked = next((text for text in said if begins_with_mark(text) and has_later_marks(text)), None)
    if marked is None:
        return None
    remedy = "Write its turns as a list of {role, content}, or import the rows as trl-preference or hh-rlhf."
    return BadRecord("a transcript inside one text", brief(marked), remedy)


AUTO = "auto"


def read_head(path: Path) -> Head:
    """The beginning of a file.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {error}", remedy="Download the file again.") from None
    text = head.decode("utf-8-sig", "replace")
    structured = text.lstrip().startswith(("[", "{")) or is_binary(head)
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
    remedy = "Name the format in place of `auto`; `rlhf data formats` shows a sample of each."
    if columns := columns_of(head.rows):
        remedy = f"{remedy} Or name its fields: {route(file, columns)}"
    raise UserError(f"{file}: auto: no format is recognised", f"Here {seen}.", remedy)
