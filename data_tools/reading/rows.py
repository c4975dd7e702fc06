"""Rows of JSON, Parquet and Arrow files, streamed, with the line and the text of each."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from rlhf.core import limits
from rlhf.data.jsonl import DECODER, READ_ERRORS, Item, OnReject, Reject, cut_off_fault, open_bytes, read_rows
from rlhf.data.schema import BadRecord

JSON = (
    *(f".{name}{zipped}" for name in ("jsonl", "json", "ndjson") for zipped in ("", ".gz", ".zst")),
    ".parquet", ".arrow",
)  # fmt: skip
"""Suffixes of the files that `rows` reads."""
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
CHUNK = 1 << 20
T = TypeVar("T")


def rows(path: Path, reject: OnReject) -> Iterator[Item]:
    """Stream the rows of a file: JSON lines, a JSON array, concatenated JSON values, Parquet or Arrow.

    Gzip and zstd are recognised by their first bytes, and the form by its first character, whatever the name. A row
    that is not JSON, or that the end of the file cuts off, goes to `reject`; damaged compression is one such row.

    Raises:
        UserError: The file cannot be opened.
    """
    item = None
    try:
        with open_bytes(path) as file:
            for item in _rows(path, file, reject):
                yield item
    except READ_ERRORS as error:
        last = item.line if item else 0
        remedy = "Download the file again; the rows before the damage were read."
        fault = BadRecord("damaged: the rest of the file cannot be read", str(error), remedy)
        reject(Reject.of(path, last + 1, fault, ""))


def converted(
    path: Path, reject: OnReject, items: Iterable[Item], convert: Callable[[Any], T]
) -> Iterator[tuple[Item, T]]:
    """Each row with what is made of its value; rows of which `convert` makes nothing go to `reject`."""
    for item in items:
        try:
            made = convert(item.value)
        except BadRecord as fault:
            reject(Reject.of(path, item.line, fault, item.raw))
        else:
            yield item, made


def in_groups(path: Path, reject: OnReject, name_of: Callable[[Any], Hashable | None]) -> Iterator[list[Item]]:
    """The rows of one name together, as soon as all are there; a row without a name (None) is alone.

    The file is read twice, first to count the rows of each name: where they are adjacent, one group is in memory at a
    time.
    """
    sizes = Counter(name_of(item.value) for item in rows(path, lambda _: None))
    there: dict[Hashable, list[Item]] = {}
    for item in rows(path, reject):
        name = name_of(item.value)
        if name is None:
            yield [item]
        else:
            there.setdefault(name, []).append(item)
            if len(there[name]) == sizes[name]:
                yield there.pop(name)


def is_binary(head: bytes) -> bool:
    """Whether a file that begins so is Parquet or Arrow."""
    return head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM))


def _rows(path: Path, file: BinaryIO, reject: OnReject) -> Iterator[Item]:
    head: bytes = file.peek(4)  # type: ignore[attr-defined]
    if is_binary(head):
        yield from _binary(_parquet(path) if head.startswith(_PARQUET) else _arrow(file, head))
        return
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    pretty = head.startswith(b"{") and head.split(b"\n")[0].rstrip().endswith((b"{", b"[", b",", b":"))
    if head.startswith(b"[") or pretty:
        yield from _Stream(path, file, reject)
    else:
        yield from read_rows(path, file, reject)


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1000)


def _arrow(file: BinaryIO, head: bytes) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file or stream; `datasets` saves streams."""
    if head.startswith(_ARROW_FILE):
        reader = pa.ipc.open_file(pa.PythonFile(file, "r"))
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(pa.PythonFile(file, "r"))


def _binary(batches: Iterator[pa.RecordBatch]) -> Iterator[Item]:
    line = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, 1000):
                for value in batch.slice(start, 1000).to_pylist():
                    line += 1
                    yield Item(line, json.dumps(value, ensure_ascii=False, default=str), value)
    except pa.ArrowException as error:
        raise OSError(str(error)) from None


class _Stream:
    """JSON values of a streamed text: an array's elements, or concatenated values.

    The decoder finds where a value ends. Where it fails, brackets are counted to distinguish a broken value from one
    that continues beyond the buffer.
    """

    def __init__(self, path: Path, file: BinaryIO, reject: OnReject) -> None:
        self._path, self._reject = path, reject
        self._file = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[type-var]
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def __iter__(self) -> Iterator[Item]:
        array = self._next() == "["
        self._at += array
        while character := self._next(","):
            if array and character == "]":
                self._at += 1
                if self._next():
                    self._refuse(BadRecord("text after the end of the array"), len(self._text))
                break
            value, end = self._value()
            raw, line = self._text[self._at : end], self._line
            fault = value if isinstance(value, BadRecord) else _not_utf8(raw)
            if fault:
                array = array and not fault.reason.startswith("the file ends")  # reported once
                self._refuse(fault, end)
            else:
                self._pass(end)
                yield Item(line, raw, value)
        else:
            if array:
                self._refuse(cut_off_fault(BadRecord("the array is not closed")), self._at)
        self._file.detach()  # the caller closes the bytes

    def _next(self, passed: str = "") -> str:
        """Move to the next character that is not white space or in `passed`; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n" + passed:
                    return self._text[self._at]
                self._pass(self._at + 1)
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read more and drop the text before `_at`. Reads double, so that one huge value takes linear time.

        Raises:
            OSError: One value is longer than a row may be.
        """
        if len(self._text) - self._at > limits.ROW_BYTES:
            raise OSError(f"a value of more than {limits.ROW_BYTES:,} characters")
        read = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + read, 0
        self._ended = not read
        return bool(read)

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _refuse(self, fault: BadRecord, end: int) -> None:
        raw = self._text[self._at : end].encode("utf-8", "surrogateescape")
        self._reject(Reject.of(self._path, self._line, fault, raw))
        self._pass(end)

    def _value(self) -> tuple[Any, int]:
        """The value that begins here, or the BadRecord that says why there is none, and where it ends."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may go on beyond the buffer
                    return value, end
            except json.JSONDecodeError as error:
                end = _end_of_value(self._text, self._at)
                if end is not None:
                    return BadRecord("not valid JSON", f"{error.msg} at its character {error.pos - self._at + 1}"), end
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                end = _end_of_value(self._text, self._at)
                if end is not None:
                    return BadRecord("not valid JSON", "nested too deeply" if deep else str(error)), end
            if not self._more() and self._ended:
                if end is not None:
                    return value, end
                return cut_off_fault(BadRecord("not closed")), len(self._text)


_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)


def _end_of_value(text: str, at: int) -> int | None:
    """Where a value that the decoder refuses ends: at its closing bracket, or before the next comma or bracket.

    None where the text ends before it does.
    """
    depth = 0
    for token in _TOKEN.finditer(text, at):
        mark = token.group()
        if mark == '"':
            return None  # a string that the text does not close
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
            if depth <= 0:
                return token.end() if depth == 0 else max(token.start(), at + 1)
        elif mark == "," and depth == 0:
            return token.start()
    return None


def _not_utf8(raw: str) -> BadRecord | None:
    if raw.isascii():
        return None
    found = re.search("[\udc80-\udcff]", raw)
    return BadRecord("not UTF-8", f"at character {found.start() + 1}", "Save the file as UTF-8.") if found else None
