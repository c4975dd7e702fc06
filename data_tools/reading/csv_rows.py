"""Rows of CSV and TSV files, streamed, with the line and the text of each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.reading.rows import rows
from rlhf.core import limits
from rlhf.core.errors import UserError, nearest
from rlhf.data.jsonl import READ_ERRORS, Item, OnReject, Reject, cut_off_fault, open_bytes
from rlhf.data.schema import BadRecord

CSV = tuple(f".{name}{zipped}" for name in ("csv", "tsv") for zipped in ("", ".gz", ".zst"))
"""Suffixes of the files that `csv_rows` reads."""
LONGEST_FIELD = 1 << 26
"""Most characters of a field; a longer one means a quote that is not closed."""
_DELIMITERS = {";": ";", "tab": "\t", "|": "|", ",": ","}
"""Usual delimiters by their names in options."""
_UNDECODED = re.compile("[\udc80-\udcff]")


class _Line(NamedTuple):
    """One row of the CSV reader: the line it begins on, its text, its fields, and its fault."""

    number: int
    raw: str
    fields: list[str]
    fault: BadRecord | None


def csv_rows(
    path: Path,
    reject: OnReject,
    *,
    columns: Collection[str] = (),
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> Iterator[Item]:
    """Stream the rows of a CSV or TSV file as {column: text}, each with the line on which it begins.

    The first line names the columns; quoted fields may hold line breaks, blank lines are skipped. Gzip and zstd
    are recognised by their first bytes. To `reject` go rows with more or fewer fields than there are columns, bytes
    that are not of the encoding, quotes out of place, and rows that the end of the file cuts off.

    Args:
        columns: Names of columns that must be there.
        delimiter: One character, or ``tab``; None takes a tab for .tsv files, else a comma.
        encoding: As Python names it; a byte order mark is dropped.

    Raises:
        UserError: The file cannot be opened, a column is missing or duplicate, or the delimiter or encoding is unknown.
    """
    lines = _lines(path, reject, delimiter, encoding)
    first = next(lines, None)
    if first is None:
        return
    header = _header(path, first, columns)
    for number, raw, fields, fault in lines:
        if fault is None and len(fields) != len(header):
            fault = BadRecord("not as many fields as columns", f"{len(fields)} fields, {len(header)} columns")
            fault = fault if raw.endswith(("\n", "\r")) else cut_off_fault(fault)
        if fault is None:
            yield Item(number, raw, dict(zip(header, fields)))
        else:
            reject(Reject.of(path, number, fault, raw.encode("utf-8", "surrogateescape")))


def csv_or_rows(path: Path, reject: OnReject) -> Iterator[Item]:
    """The rows of a file: as `csv_rows` gives them if its name says CSV or TSV, else as `rows` does."""
    return (csv_rows if path.name.endswith(CSV) else rows)(path, reject)


def csv_columns(path: Path, *, delimiter: str | None = None, encoding: str = "utf-8") -> list[str]:
    """The names of a file's columns; none where nothing can be read.

    Raises:
        UserError: As `csv_rows` does.
    """
    first = next(_lines(path, lambda _: None, delimiter, encoding), None)
    return _header(path, first, ()) if first else []


def _header(path: Path, line: _Line, columns: Collection[str]) -> list[str]:
    """The names of the columns, of which those that are needed are there once."""
    if line.fault is not None:
        raise UserError(f"{path}:{line.number}: the names of the columns: {line.fault}", remedy=line.fault.remedy)
    header = [name.strip() for name in line.fields]
    for name in columns:
        if name not in header:
            cut = [word for word, mark in _DELIMITERS.items() if len(header) == 1 and mark in header[0]]
            remedy = f"Is it cut at another character: --option delimiter='{cut[0]}'?" if cut else nearest(name, header)
            raise UserError(f"{path}: no column is called {name!r}", remedy=remedy)
        if header.count(name) > 1:
            raise UserError(f"{path}: {header.count(name)} columns are called {name!r}", remedy="Rename one of them.")
    return header


def _lines(path: Path, reject: OnReject, delimiter: str | None, encoding: str) -> Iterator[_Line]:
    """The rows of the CSV reader without blank lines; damage goes to `reject`."""
    if delimiter is None:
        delimiter = "\t" if ".tsv" in path.suffixes else ","
    delimiter = _DELIMITERS.get(delimiter, delimiter)
    if len(delimiter) != 1 or delimiter in '\r\n" ':
        raise UserError(f"delimiter: not one character: {delimiter!r}", remedy="Write , or ; or | or tab.")
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8", "utf_8") else encoding
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except (LookupError, ValueError):
        raise UserError(f"encoding: none is called {encoding!r}", remedy="Write utf-8, cp1252 or utf-16.") from None
    csv.field_size_limit(LONGEST_FIELD)  # for the whole process; Python's default is too low for long answers
    with open_bytes(path) as file:
        text = _Text(file, encoding)
        try:
            yield from _parsed(text, delimiter, encoding)
        except (*READ_ERRORS, UnicodeError) as error:
            remedy = "Download the file again; the rows before the damage were read."
            fault = BadRecord("damaged: the rest of the file cannot be read", str(error), remedy)
            reject(Reject.of(path, text.count + 1, fault, ""))


class _Text:
    """The lines of a text; `taken` has those of the CSV reader's current row."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
        self.count = 0
        self.taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(limits.ROW_BYTES):
            if len(line) == limits.ROW_BYTES:
                raise OSError(f"a line of more than {limits.ROW_BYTES:,} characters")
            self.count += 1
            self.taken.append(line)
            yield line
        self._text.detach()  # the caller closes the bytes


def _parsed(text: _Text, delimiter: str, encoding: str) -> Iterator[_Line]:
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        number = text.count + 1
        text.taken.clear()
        fault = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            remedy = 'Put a field with quotes in quotes, and double them inside: "say ""hello""".'
            fields, fault = [], BadRecord("not valid CSV", str(error), remedy)
            if str(error) == "unexpected end of data":
                fault = cut_off_fault(BadRecord("a quote is not closed"))
        if fields is None:
            return
        raw = "".join(text.taken)
        if not raw.isascii() and _UNDECODED.search(raw):
            remedy = "Save the file as UTF-8, or name its encoding: --option encoding=cp1252"
            fault = BadRecord("not UTF-8" if encoding == "utf-8-sig" else f"not {encoding}", remedy=remedy)
        if fields or fault:
            yield _Line(number, raw, fields, fault)
