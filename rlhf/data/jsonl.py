"""Records as JSON, and JSONL files: rejected rows are reported with their line, the reason and what to do."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import orjson
import zstandard

from rlhf.core import limits
from rlhf.core.errors import UserError, blame
from rlhf.data.schema import (
    KINDS,
    BadRecord,
    Candidate,
    Message,
    Proposal,
    Ranking,
    Record,
    brief,
    field_names,
)

# ---- the JSON form of a record -----------------------------------------------------------------------------------


def from_dict(row: Any, kind: str | None = None) -> Record:
    """A record from its JSON form. Unknown fields are ignored.

    Args:
        row: A mapping with the record's fields. `messages` may also be called `prompt` and be a plain string; a
            candidate may be a plain string; instead of `ranks`, each candidate may have a `rank`.
        kind: prompt, demonstration, proposal or ranking; rows of another kind are refused. None allows any.

    Raises:
        BadRecord: A field is missing, has the wrong type, or contradicts another.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("not an object", type(row).__name__)
    found = _kind(row)
    if kind is not None and found != kind:
        remedy = "Rankings have `candidates` and `ranks`, proposals only `candidates`, demonstrations `answer`."
        raise BadRecord(f"a {found} where a {kind} is needed", remedy=remedy)
    if "messages" not in row and "prompt" not in row:
        names = brief(", ".join(map(str, row))) if row else "none"
        raise BadRecord("messages: none", f"the row's fields: {names}", "Give the field `prompt` or `messages`.")
    values: dict[str, Any] = {"messages": _messages(row.get("messages", row.get("prompt")))}
    values |= {name: row[name] for name in _TEXTS[found] if row.get(name) not in (None, "")}
    if found == "demonstration":
        values["answer"] = row["answer"]
    elif found != "prompt":
        values["candidates"] = _each(_candidate, row["candidates"])
    if found == "ranking":
        values["ranks"] = _ranks(row)
        values |= {name: row[name] for name in ("seconds", "shown", "weight") if row.get(name) is not None}
        if isinstance(row.get("merged"), list):
            values["merged"] = tuple(row["merged"])
    record = KINDS[found](**values)
    for name in ("id", "prompt_id"):
        if row.get(name) is not None and row[name] != getattr(record, name):
            detail = f"{brief(row[name])}, the content gives {getattr(record, name)!r}"
            raise BadRecord(f"{name}: not the content hash", detail, f"Omit `{name}`; it is computed.")
    return record


_TEXTS = {
    kind: tuple(
        name for name in ("source", "group", "split", "author", "annotator", "time", "merged")
        if name in field_names(kind)
    )
    for kind in KINDS
}  # fmt: skip
"""Kind -> the fields of which an empty text means none."""


def _kind(row: Mapping[str, Any]) -> str:
    if "candidates" not in row:
        return "demonstration" if "answer" in row else "prompt"
    return "proposal" if _ranks(row) in (None, ()) else "ranking"


def _or(value: Any, default: Any) -> Any:
    return default if value is None or value == "" else value


def _ranks(row: Mapping[str, Any]) -> Any:
    ranks, candidates = row.get("ranks"), row["candidates"]
    if ranks is None and isinstance(candidates, list | tuple):
        ranks = [one["rank"] for one in candidates if isinstance(one, Mapping) and "rank" in one]
    return tuple(ranks) if isinstance(ranks, list) else ranks


def _messages(value: Any) -> Any:
    return (Message("user", value),) if isinstance(value, str) else _each(_message, value)


def _each(make: Callable[[Any], Any], values: Any) -> Any:
    """What is made of each value of a list; anything else as it is, for the record to refuse."""
    return tuple(map(make, values)) if isinstance(values, list | tuple) else values


def _message(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    role: Any = value.get("role")  # checked by the record
    content: Any = value.get("content")
    if value.get("tool_calls"):
        raise BadRecord("messages: tool_calls in a turn", brief(value["tool_calls"]), "Import as openai-chat.")
    return Message(role, content)


def _candidate(value: Any) -> Any:
    if isinstance(value, str):
        return Candidate(value)
    if not isinstance(value, Mapping):
        return value
    text: Any = value.get("text")  # checked by the record
    return Candidate(text, _or(value.get("author"), ""), _or(value.get("author_kind"), "unknown"), value.get("score"))


def to_dict(record: Record) -> dict[str, Any]:
    """The JSON form of a record, including its ids; `from_dict` reads it back."""
    row = {name: getattr(record, name) for name in field_names(record.kind)} | {"messages": record.chat}
    if isinstance(record, Proposal):
        scores = [None if candidate.score is None else float(candidate.score) for candidate in record.candidates]
        row["candidates"] = [one._asdict() | {"score": score} for one, score in zip(record.candidates, scores)]
    if isinstance(record, Ranking):
        row |= {"ranks": list(record.ranks), "merged": list(record.merged), "weight": float(record.weight)}
    return row


# ---- files with a row per line ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reject:
    """A rejected row: its file and line, the reason, the raw row, and what to do.

    `reason` has the same words for every row with that fault; `detail` is specific to this one.
    """

    file: str
    line: int
    reason: str
    raw: str
    detail: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, path: Path, line: int, fault: BadRecord, raw: str | bytes) -> Reject:
        """The reject for the row on that line."""
        text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        return cls(str(path), line, fault.reason, text.rstrip("\r\n"), fault.detail, fault.remedy)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


class Item(NamedTuple):
    """One row of a file: the line it begins on (its number from 1, in Parquet), its text, its value."""

    line: int
    raw: str | bytes
    value: Any


_item = partial(tuple.__new__, Item)  # a third of the time of `Item(...)`

OnReject = Callable[[Reject], None]


def read_jsonl(path: Path, kind: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Stream records from a JSONL file, also gzip or zstd. Bad lines go to `on_reject`.

    Args:
        kind: The kind of every record. None means the kind of the first valid row.

    Raises:
        UserError: The file cannot be read, or its compressed data is damaged.
    """
    line = 0
    try:
        with open_bytes(path) as file:
            for line, raw, row in read_rows(path, file, on_reject):
                try:
                    record = from_dict(row, kind)
                except BadRecord as fault:
                    on_reject(Reject.of(path, line, fault, raw))
                else:
                    kind = record.kind
                    record.read_from(path, line)
                    yield record
    except READ_ERRORS as error:
        raise UserError(f"{path}: damaged after line {line}: {error}", remedy="Download the file again.") from None


def read_rows(path: Path, file: BinaryIO, on_reject: OnReject) -> Iterator[Item]:
    """Stream the rows of a file with one JSON value per line.

    Blank lines are skipped. Lines that are not UTF-8 or not JSON, or that the end of the file cuts off, go to
    `on_reject`.

    Raises:
        EOFError, zlib.error, OSError: The `READ_ERRORS`: damaged compressed data, or an unreadable file.
    """
    line, longest = 0, limits.ROW_BYTES
    while raw := file.readline(longest):  # every row of every import comes here, so a usual one takes few steps
        line += 1
        if len(raw) == longest and not raw.endswith(b"\n"):
            while (rest := file.readline(longest)) and not rest.endswith(b"\n"):
                pass
            fault = BadRecord("a line that is too long", f"more than {longest:,} bytes", "Shorten the texts.")
            on_reject(Reject.of(path, line, fault, raw[:RAW_KEPT]))
            continue
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError:
            if raw.isspace():
                continue
            try:
                row = parse(raw)
            except BadRecord as error:
                on_reject(Reject.of(path, line, error if raw.endswith(b"\n") else cut_off_fault(error), raw))
                continue
        yield _item((line, raw, row))


def parse(raw: bytes) -> Any:
    """The value of a JSON text. NaN and Infinity are refused, because JSON does not have them.

    Raises:
        BadRecord: The text is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass  # the slower decoder below says where, and accepts lone surrogates, which the schema reports
    try:
        return DECODER.decode(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"at byte {error.start}", "Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        detail = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        raise BadRecord("not valid JSON", detail, "Put one JSON object on each line.") from None
    except ValueError as error:
        raise BadRecord("not valid JSON", str(error), "Omit the value, or write a number or null.") from None
    except RecursionError:
        raise BadRecord("not valid JSON", "nested too deeply", "A record has three levels.") from None


def cut_off_fault(fault: BadRecord) -> BadRecord:
    """The fault of an incomplete row at the end of a file."""
    remedy = "The download or export may have been interrupted; download the file again."
    return BadRecord("the file ends in the middle of a record", str(fault), remedy)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)

RAW_KEPT = 10_000
"""Most bytes that are kept of a line that is too long."""
READ_BUFFER = 1 << 17
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
READ_ERRORS = (EOFError, zlib.error, OSError)
"""Exceptions from damaged compressed data or an unreadable file (`zstandard.ZstdError` becomes an OSError)."""


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed. gzip and zstd are recognised by their first bytes, not by the name.

    Raises:
        UserError: The file cannot be opened, or is named .gz or .zst but is not compressed.
    """
    with blame(f"{path}: cannot be read"):
        plain = io.BufferedReader(io.FileIO(path), READ_BUFFER)
    with plain:
        head = plain.peek(4)[:4]
        if head.startswith(GZIP):
            yield io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=plain), plain), READ_BUFFER)
        elif head == ZSTD:
            yield io.BufferedReader(_Unpacked(_Zstd(plain), plain), READ_BUFFER)
        elif head and path.suffix in (".gz", ".zst"):
            name = "gzip" if path.suffix == ".gz" else "zstd"
            raise UserError(
                f"{path}: the name ends in {path.suffix} but the content is not {name}",
                remedy="Rename it, or download the file again.",
            )
        else:
            yield plain


class _Unpacked(io.RawIOBase):
    """The content of a compressed file. Raises OSError where it is far longer than the file; see `limits`."""

    def __init__(self, content: Any, packed: BinaryIO) -> None:
        self._content, self._packed, self._count = content, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._content.readinto(buffer))
        self._count += size
        if self._count > limits.UNPACKED_BYTES and self._count > limits.UNPACKED_RATIO * self._packed.tell():
            raise OSError(
                f"it unpacks to more than {limits.UNPACKED_RATIO} times its size, as files do that are made to fill "
                "the memory; if it is right, unpack it before"
            )
        return size


class _Zstd(io.RawIOBase):
    """A zstd stream of one or more frames. Damage raises OSError, a cut-off stream EOFError, as gzip does.

    (`zstandard`'s own stream reader does not notice that a stream is cut off.)
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decompressor = file, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(1 << 14)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the zstd stream is cut off")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
