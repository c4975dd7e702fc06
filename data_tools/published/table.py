"""The table of formats, and the common path of those in which each row is converted by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from data_tools.reading.fields import need, without_nulls
from data_tools.reading.rows import JSON, rows
from data_tools.reading.turns import begins_with_mark, has_later_marks
from data_tools.reading.unread import NestedFields
from rlhf.core.table import Table
from rlhf.data.columns import Row
from rlhf.data.jsonl import Item, OnReject, Reject
from rlhf.data.schema import BadRecord, Demonstration, Prompt, Record, brief

IMPORTERS = Table("format")
SAMPLES = Path(__file__).with_name("samples")


# ---- recognising a format --------------------------------------------------------------------------------------------


class FileHead(NamedTuple):
    """The beginning of a file, from which `auto` recognises its format."""

    path: Path
    text: str
    """The first 4,096 characters."""
    rows: list[Any]
    """The values of the first rows, at most 20; none where the file is none of JSON, Parquet and Arrow."""

    def all_have(self, *fields: str) -> bool:
        """Whether there are rows, and each is an object with these fields."""
        return bool(self.rows) and all(isinstance(row, dict) and row.keys() >= set(fields) for row in self.rows)


Detect = Callable[[FileHead], str | None]
"""Why a file that begins so is of a format, as the end of the sentence "it is ... because ..."; else None."""


def rows_have(*fields: str, where: Callable[[Any], Any] | None = None, why: str = "") -> Detect:
    """Recognises files whose rows all have these fields, and for which `where` holds."""
    *most, last = (f"`{field}`" for field in fields)
    why = why or f"its rows have {', '.join(most)}{' and ' * bool(most)}{last}"
    return lambda head: why if head.all_have(*fields) and all(map(where or bool, head.rows)) else None


def any_of(*ways: Detect) -> Detect:
    """Recognises files by the first of these ways that does."""
    return lambda head: next(filter(None, (way(head) for way in ways)), None)


def are(kind: type, *fields: str) -> Callable[[Any], bool]:
    """Whether these fields of a row are all of a type."""
    return lambda row: all(isinstance(row[name], kind) for name in fields)


# ---- the rows of the table -------------------------------------------------------------------------------------------


def file_format(
    name: str, *, detect: Detect, suffixes: tuple[str, ...] = JSON, sample: str | None = None
) -> Callable[[Any], Any]:
    """Decorator of an importer, a function ``(path, reject, *, options) -> Iterator[Record]`` of one file.

    Args:
        sample: The sample, where it is no file NAME.* in `SAMPLES`.
    """
    sample = next(SAMPLES.glob(f"{name}.*")).read_text("utf-8") if sample is None else sample
    return IMPORTERS.row(name, suffixes=suffixes, sample=sample, detect=detect)


def row_format(
    name: str,
    *fields: str,
    detect: Detect | None = None,
    left_out: Collection[str] | Callable[..., Collection[str]] = (),
    usual: Callable[[Any], Row | None] | None = None,
    read: Callable[[Path, OnReject], Iterator[Item]] = rows,
    **traits: Any,
) -> Callable[[Any], Any]:
    """Decorator of a function ``(row, *, options) -> Record | Iterable[Record | BadRecord]``, of which an importer is
    made: it converts one JSON object, or raises BadRecord.

    Args:
        fields: What every row needs. By default, files whose rows all have them are recognised.
        left_out, usual, read: As `convert_rows` takes them; `left_out` may be a function of the options.
        traits: As `file_format` takes them.
    """

    def add(convert: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(convert)
        def importer(path: Path, reject: OnReject, **options: Any) -> Iterator[Record]:
            def checked(row: Any) -> Any:
                return convert(need(row, *fields) if fields else row, **options)

            ignored = left_out(**options) if callable(left_out) else left_out
            return convert_rows(path, reject, checked, ignored, usual, read)

        hints = get_type_hints(convert)  # the names in its annotations are those of its module
        parameters = list(inspect.signature(convert).parameters.values())[1:]
        options = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
        importer.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        file_format(name, detect=detect or rows_have(*fields), **traits)(importer)
        return convert

    return add


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
    nested = NestedFields(reject, left_out)

    def convert_whole(row: Any) -> list[Record | BadRecord]:
        converted = convert(row)
        return [converted] if isinstance(converted, Prompt) else list(converted)

    for line, raw, value in read(path, reject):
        if usual is not None and (ranking := usual(value)) is not None:
            yield ranking
            continue
        try:
            value = without_nulls(value) if (b"null" if isinstance(raw, bytes) else "null") in raw else value
            made = nested.converted(convert_whole, value, _has_record)
        except BadRecord as error:
            reject(Reject.of(path, line, error, raw))
            continue
        for record in made:
            fault = record if isinstance(record, BadRecord) else _transcript_fault(record)
            if fault is None:
                yield record
            else:
                reject(Reject.of(path, line, fault, raw))


def _has_record(made: list[Record | BadRecord]) -> bool:
    return any(isinstance(record, Prompt) for record in made)


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
