"""Rows of JSONL files, and the account of those that are set aside: where each stands, why, and what to do about it."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlhf.errors import UserError
from rlhf.schema import BadRecord, Record, from_dict


@dataclass(frozen=True)
class Reject:
    """A row set aside: where it stands, why, the row as it was read, and what to do about it.

    `reason` is the same words for every row with that fault; `detail` is particular to this one.
    """

    file: str
    line: int
    reason: str
    raw: str
    detail: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, path: Path, line: int, fault: BadRecord, raw: str | bytes) -> Reject:
        """The row on that line, set aside for that fault."""
        text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        return cls(str(path), line, fault.reason, text.rstrip("\r\n"), fault.detail, fault.remedy)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


OnReject = Callable[[Reject], None]


def read_jsonl(path: Path, kind: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Stream records from a JSONL file (gzip allowed); a bad line is handed to `on_reject` with its number.

    Args:
        kind: The kind of every record; None lets the first usable row decide.

    Raises:
        UserError: The file cannot be read, or its gzip stream is damaged.
    """
    for line, raw, row in read_rows(path, on_reject):
        try:
            record = from_dict(row, kind)
        except BadRecord as fault:
            on_reject(Reject.of(path, line, fault, raw))
        else:
            kind = record.kind
            yield record


def read_rows(path: Path, on_reject: OnReject) -> Iterator[tuple[int, bytes, Any]]:
    """Stream (line number, raw line, parsed value) from a file of one JSON value a line, gzip allowed.

    Blank lines are passed over. A line that is not UTF-8 or not JSON is handed to `on_reject`. NaN and Infinity are
    refused: JSON has no such numbers.

    Raises:
        UserError: The file cannot be read, or its gzip stream is damaged.
    """
    for line, raw in _lines(path):
        if raw.isspace():
            continue
        try:
            row = _json.decode(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            fault = BadRecord("not UTF-8", f"at byte {error.start}", "Save the file as UTF-8.")
        except json.JSONDecodeError as error:
            detail = f"{error.msg} at character {error.pos + 1}"
            fault = BadRecord("not valid JSON", detail, "Put one JSON object on each line.")
        except ValueError as error:
            fault = BadRecord("not valid JSON", str(error), "Leave the value out, or write a number or null.")
        except RecursionError:
            fault = BadRecord("not valid JSON", "nested too deeply", "A record needs three levels.")
        else:
            yield line, raw, row
            continue
        on_reject(Reject.of(path, line, fault, raw))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_json = json.JSONDecoder(parse_constant=_no_constant)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, without a byte order mark; gzip is recognised by its first two bytes, whatever the name."""
    line = 0
    try:
        with open(path, "rb") as plain:
            zipped = plain.peek(2)[:2] == b"\x1f\x8b"
            if path.suffix == ".gz" and not zipped and plain.peek(1):
                raise UserError(f"{path}: named .gz and is not gzip", remedy="Rename it, or fetch the file again.")
            file = io.BufferedReader(gzip.GzipFile(fileobj=plain)) if zipped else plain
            for line, raw in enumerate(file, 1):
                yield line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    except (EOFError, zlib.error, OSError) as error:
        damaged = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
        what = f"damaged gzip after line {line}" if damaged else "cannot be read"
        raise UserError(f"{path}: {what}: {error}", remedy="Fetch the file again." if damaged else "") from None
