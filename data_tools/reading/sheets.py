"""Rows of Excel workbooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError, nearest
from rlhf.data.jsonl import Item

EXCEL = (".xlsx",)
"""Suffixes of the files that `sheet_rows` reads."""


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
            yield from _rows(path, filled[sheet or next(iter(filled))])
    finally:
        book.close()


def _rows(path: Path, sheet: Any) -> Iterator[Item]:
    lines = sheet.iter_rows(values_only=True)
    header = [f"column {n}" if name is None else str(name).strip() for n, name in enumerate(next(lines), 1)]
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}: several columns are called {doubled[0]!r}", remedy="Rename one of them.")
    for number, values in enumerate(lines, 2):
        if all(value is None for value in values):
            continue
        row = dict(zip(header, values))
        yield Item(number, json.dumps(row, ensure_ascii=False, default=str), row)
