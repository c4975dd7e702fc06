"""`auto`: which format a file is of, and why."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from data_tools.published.table import IMPORTERS, FileHead
from data_tools.reading.cells import columns_of
from data_tools.reading.route import route
from data_tools.reading.rows import is_binary, rows
from rlhf.core.errors import UserError
from rlhf.data.jsonl import READ_ERRORS, open_bytes

AUTO = "auto"


def read_head(path: Path) -> FileHead:
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
    return FileHead(path, text, [item.value for item in first])


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
