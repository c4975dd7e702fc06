"""Rows of any container as a mapping of columns reads them: CSV, TSV, JSON, Parquet, Arrow, Excel."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import date, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_tools.reading.csv_rows import CSV, csv_columns, csv_rows
from data_tools.reading.rows import JSON, is_binary, rows
from rlhf.core.errors import UserError, nearest
from rlhf.data.jsonl import READ_ERRORS, Item, OnReject, open_bytes

EXCEL = (".xlsx",)
"""Suffixes of the files that `sheet_rows` reads."""
TABLES = (*CSV, *EXCEL, *JSON)
"""Suffixes of the files that `cell_rows` reads."""
LOOKED_AT = 1000
"""Rows in which a column must appear at least once, where a file does not name its columns."""


class Cells(Mapping[str, str]):
    """One row: column -> its text, empty where the row has none. A dotted path such as ``answers.0.text`` is a column.

    `value` gives what the row holds, such as a list.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def value(self, column: str) -> Any:
        """What the row holds; None where it has no such column."""
        return next(iter(self._found(column)), None)

    def has(self, column: str) -> bool:
        """Whether the row has the column, be it null."""
        return bool(self._found(column))

    def _found(self, column: str) -> list[Any]:
        """The value of the column in a list, or an empty list."""
        if column in self._row:
            return [self._row[column]]
        found: Any = self._row
        for part in column.split("."):
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.lstrip("-").isdigit() and -len(found) <= int(part) < len(found):
                found = found[int(part)]
            else:
                return []
        return [found]

    def __getitem__(self, column: str) -> str:
        return as_text(self.value(column))

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def as_text(value: Any) -> str:
    """A value as a cell of a table shows it: whole numbers without a fraction, lists and objects as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False, default=str)


def cell_rows(
    path: Path, reject: OnReject, columns: Collection[str], *, delimiter: str | None, encoding: str, sheet: str | None
) -> Iterator[Item]:
    """Stream the rows of a file as `Cells`.

    Args:
        columns: Columns that must be there: in the header, or in one of the first 1,000 rows.
        delimiter, encoding: As `csv_rows` takes them.
        sheet: Of a workbook; None takes the only one with rows.

    Raises:
        UserError: As `csv_rows` and `sheet_rows` do, or a column is missing.
    """
    if is_table_text(path):
        items = csv_rows(path, reject, columns=columns, delimiter=delimiter, encoding=encoding)
    else:
        items = _known_columns(path, _objects(path, reject, sheet), columns)
    return (Item(line, raw, Cells(row)) for line, raw, row in items)


def cell_columns(path: Path, *, delimiter: str | None, encoding: str, sheet: str | None) -> dict[str, list[Any]]:
    """The columns of a file -> their values in the first 20 rows; none where nothing can be read.

    Raises:
        UserError: As `cell_rows` does.
    """
    if is_table_text(path):
        names = csv_columns(path, delimiter=delimiter, encoding=encoding)
        items = csv_rows(path, lambda _: None, delimiter=delimiter, encoding=encoding) if names else iter(())
    else:
        names, items = [], _objects(path, lambda _: None, sheet)
    return columns_of([row for _, _, row in islice(items, 20)], names)


def columns_of(found: Collection[Any], names: Collection[str] = ()) -> dict[str, list[Any]]:
    """The fields of rows -> their values, without nulls; `names` come first."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row in found:
        for name, value in row.items() if isinstance(row, dict) else ():
            columns.setdefault(name, []).extend([] if value is None else [value])
    return columns


def is_table_text(path: Path) -> bool:
    """Whether the file is CSV or TSV rather than JSON, Parquet, Arrow or a workbook."""
    head = _head(path)
    if is_binary(head) or is_workbook(head):
        return False
    return path.name.lower().endswith(CSV) or not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"[", b"{"))


def _head(path: Path) -> bytes:
    """The first bytes of a file, unpacked; none where it is damaged, which reading its rows reports."""
    try:
        with open_bytes(path) as file:
            return bytes(file.peek(64))  # type: ignore[attr-defined]
    except READ_ERRORS:
        return b""


def _objects(path: Path, reject: OnReject, sheet: str | None) -> Iterator[Item]:
    workbook = is_workbook(_head(path))
    for line, raw, value in sheet_rows(path, sheet) if workbook else rows(path, reject):
        yield Item(line, raw, value if isinstance(value, dict) else {})


def _known_columns(path: Path, items: Iterator[Item], columns: Collection[str]) -> Iterator[Item]:
    first = list(islice(items, LOOKED_AT))
    for column in columns if first else ():
        if not any(Cells(row).has(column) for _, _, row in first):
            there = list(columns_of([row for _, _, row in first]))
            raise UserError(f"{path}: no column is called {column!r}", remedy=nearest(column, there))
    return chain(first, items)


# ---- Excel workbooks ---------------------------------------------------------------------------------------------


def is_workbook(head: bytes) -> bool:
    """Whether a file that begins so is a zip archive, as workbooks are."""
    return head.startswith(b"PK\x03\x04")


def sheet_rows(path: Path, sheet: str | None = None) -> Iterator[Item]:
    """Stream the rows of a workbook's sheet as {column: value}, each with its number. Formulas give their last result.

    The first row names the columns; empty rows are skipped.

    Args:
        sheet: Its name. None takes the only sheet with rows.

    Raises:
        UserError: openpyxl is not installed, the file is no workbook, or several sheets have rows.
    """
    try:
        import openpyxl
    except ImportError:
        remedy = "Install it: pip install openpyxl. Or save the sheet as CSV UTF-8 and import that file."
        raise UserError(f"{path}: reading Excel workbooks needs openpyxl", remedy=remedy) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises whatever zipfile, its XML parser or its own checks do
        raise UserError(f"{path}: not a workbook that can be read: {error}", remedy="Save the sheet as CSV.") from None
    try:
        filled = {each.title: each for each in book.worksheets if next(each.iter_rows(min_row=2), None)}
        if sheet is not None and sheet not in filled:
            raise UserError(f"{path}: no sheet with rows is called {sheet!r}", remedy=nearest(sheet, filled))
        if sheet is None and len(filled) > 1:
            remedy = f"Name the one to import: --option sheet='{next(iter(filled))}'"
            raise UserError(f"{path}: several sheets have rows: {', '.join(map(repr, filled))}", remedy=remedy)
        if filled:
            yield from _sheet(path, filled[sheet or next(iter(filled))])
    finally:
        book.close()


def _sheet(path: Path, sheet: Any) -> Iterator[Item]:
    lines = sheet.iter_rows(values_only=True)
    header = [f"column {n}" if name is None else str(name).strip() for n, name in enumerate(next(lines), 1)]
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}: several columns are called {doubled[0]!r}", remedy="Rename one of them.")
    for number, values in enumerate(lines, 2):
        if all(value is None for value in values):
            continue
        row = dict(zip(header, values))
        yield Item(number, json.dumps(row, ensure_ascii=False, default=str), row)
