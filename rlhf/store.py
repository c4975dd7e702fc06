"""Datasets on disk: a folder of Parquet shards with a `manifest.json`, or a `.jsonl` (`.jsonl.gz`) file.

Both are streamed, so a dataset may be larger than memory; a folder appears under its name only when it is whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.lazy import lazy
from rlhf.schema import KINDS, SCHEMA_VERSION, BadRecord, Record, from_dict, to_dict

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa, pq = lazy("pyarrow"), lazy("pyarrow.parquet")

ROWS_PER_SHARD = 200_000
ROWS_PER_GROUP = 5_000


def _arrow_schema(kind: str) -> pa.Schema:
    text = pa.string()
    fields = [("id", text), ("prompt_id", text)]
    fields += [("messages", pa.list_(pa.struct([("role", text), ("content", text)])))]
    fields += [("source", text), ("group", text), ("split", text)]
    if kind == "demonstration":
        fields += [("answer", text), ("author", text)]
    elif kind == "ranking":
        candidate = pa.struct([("text", text), ("author", text), ("author_kind", text), ("score", pa.float64())])
        fields += [("candidates", pa.list_(candidate)), ("ranks", pa.list_(pa.int32()))]
        fields += [("annotator", text), ("time", text)]
    return pa.schema(fields)


@dataclass(frozen=True)
class Reject:
    """A row set aside: where it stands, why, and the raw text (cut to 10,000 characters)."""

    file: str
    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: a folder with a manifest, or a JSONL file. Records are streamed, never all in memory."""

    path: Path
    kind: str
    fingerprint: str
    """SHA-256 (64 hex digits) over the content."""
    manifest: dict[str, Any] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    """Bad rows met by the last full pass over a JSONL file."""

    def records(self, split: str | None = None) -> Iterator[Any]:
        """Stream the records, optionally of one split only. Bad JSONL rows go to `rejects`."""
        rows = self._jsonl_records() if self.path.is_file() else self._parquet_records()
        return (record for record in rows if split is None or record.split == split)

    def _parquet_records(self) -> Iterator[Record]:
        for shard in self.manifest["shards"]:
            with pq.ParquetFile(self.path / shard["file"]) as file:
                for batch in file.iter_batches(batch_size=1000):
                    for row in batch.to_pylist():
                        row.pop("id", None)  # derived from content; the shard's checksum guards it
                        yield from_dict(row, self.kind)

    def _jsonl_records(self) -> Iterator[Record]:
        self.rejects.clear()
        yield from read_jsonl(self.path, self.kind, self.rejects.append)

    def splits(self) -> dict[str | None, int]:
        """How many records each split holds."""
        if "splits" in self.manifest:
            return {None if key == "none" else key: count for key, count in self.manifest["splits"].items()}
        counts: dict[str | None, int] = {}
        for record in self.records():
            counts[record.split] = counts.get(record.split, 0) + 1
        return counts


def read_jsonl(path: Path, kind: str | None, on_reject: Callable[[Reject], None]) -> Iterator[Record]:
    """Stream records from a JSONL file (.gz allowed); a bad line is handed to `on_reject` with its number."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                yield from_dict(json.loads(raw.decode("utf-8")), kind)
            except (BadRecord, ValueError, RecursionError) as error:
                reason = str(error) if isinstance(error, BadRecord) else f"not valid JSON: {error}"
                on_reject(Reject(str(path), line, reason, raw[:10_000].decode("utf-8", "replace")))


def open_dataset(path: str | Path, kind: str | None = None, verify: bool = False) -> Dataset:
    """Open a dataset folder or a JSONL file.

    Args:
        path: Folder with `manifest.json`, or `.jsonl` / `.jsonl.gz`.
        kind: The kind that the caller needs; another is refused.
        verify: Also compare every shard with its recorded SHA-256.

    Raises:
        UserError: Nothing there, not a whole dataset, another schema version, another kind, or a damaged shard.
    """
    path = Path(path)
    if path.is_file():
        dataset = _open_jsonl(path)
    elif (path / "manifest.json").is_file():
        dataset = _open_folder(path, verify)
    elif path.is_dir():
        raise UserError(
            f"{path}: a folder without manifest.json is not a whole dataset",
            "The manifest is written last, so an import or split may have been interrupted.",
            "Run the command that writes it again, or name a .jsonl file.",
        )
    else:
        raise UserError(f"{path}: no dataset there", remedy="Check the path; make one with `rlhf data import`.")
    if kind is not None and dataset.kind != kind:
        raise UserError(
            f"{path}: holds {dataset.kind}s where {kind}s are needed",
            remedy=f"Name a dataset of {kind}s; `rlhf data stats {path}` shows what this one holds.",
        )
    return dataset


def _open_jsonl(path: Path) -> Dataset:
    first: list[str] = []
    rejects: list[Reject] = []
    for record in read_jsonl(path, None, rejects.append):
        first.append(record.kind)
        break
    if not first:
        why = f"line {rejects[0].line}: {rejects[0].reason}" if rejects else "The file is empty."
        raise UserError(f"{path}: no usable record", why, "See README, 'Your own data', for the fields.")
    return Dataset(path, first[0], _file_hash(path))


def _open_folder(path: Path, verify: bool) -> Dataset:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        version, kind, shards = manifest["schema_version"], manifest["kind"], manifest["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/manifest.json: not a dataset manifest ({error!r})") from None
    if version != SCHEMA_VERSION or kind not in KINDS:
        raise UserError(
            f"{path}: schema version {version}, kind {kind!r}; this version reads {SCHEMA_VERSION}",
            remedy="Import the data again with this version.",
        )
    for shard in shards:
        file = path / shard["file"]
        if not file.is_file() or (verify and _file_hash(file) != shard["sha256"]):
            raise UserError(
                f"{file}: {'damaged: not the bytes that were written' if file.is_file() else 'missing'}",
                remedy="Import the data again, or bring the file back from a copy.",
            )
    fingerprint = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
    return Dataset(path, kind, fingerprint, manifest)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DatasetWriter:
    """Write a dataset folder in a stream; it appears under its name only when whole.

    Used as a context manager. Records go to Parquet shards in a hidden neighbour folder, the manifest last; leaving
    the block renames it. An exception leaves nothing behind. An existing dataset of that name is replaced.

    Args:
        path: The folder to make.
        kind: prompt, demonstration or ranking.
        origin: Where the records came from (any JSON), kept in the manifest under `origin`.
    """

    def __init__(self, path: str | Path, kind: str, origin: Mapping[str, Any] | None = None) -> None:
        self.path, self.kind, self.origin = Path(path), kind, dict(origin or {})
        self.partial = self.path.parent / f".{self.path.name}.partial"
        self.count = 0
        self._splits: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._shards: list[dict[str, Any]] = []
        self._file: pq.ParquetWriter | None = None
        self._in_shard = 0

    def __enter__(self) -> DatasetWriter:
        if self.path.exists() and not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path}: exists and is not a dataset", remedy="Choose another --out.")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def write(self, record: Record) -> None:
        """Add one record of the writer's kind."""
        if record.kind != self.kind:
            raise BadRecord(f"a {record.kind} in a dataset of {self.kind}s")
        split = record.split or "none"
        self._splits[split] = self._splits.get(split, 0) + 1
        self._rows.append(to_dict(record))
        self.count += 1
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.parquet"
            self._file = pq.ParquetWriter(self.partial / name, _arrow_schema(self.kind), compression="zstd")
            self._shards.append({"file": name})
        self._file.write_table(pa.Table.from_pylist(self._rows, _arrow_schema(self.kind)))
        self._in_shard += len(self._rows)
        self._rows = []
        if self._in_shard >= ROWS_PER_SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        file = self.partial / self._shards[-1]["file"]
        sync(file)
        self._shards[-1] |= {"rows": self._in_shard, "sha256": _file_hash(file)}
        self._file, self._in_shard = None, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self._rows or not self._shards:
            self._flush()
        if self._file is not None:
            self._close_shard()
        manifest = {"schema_version": SCHEMA_VERSION, "kind": self.kind, "count": self.count}
        manifest |= {"splits": self._splits, "shards": self._shards, "origin": self.origin}
        write_json(self.partial / "manifest.json", manifest)
        shutil.rmtree(self.path, ignore_errors=True)
        os.rename(self.partial, self.path)
        sync(self.path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename after it cannot outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, flush it, rename it: never a half file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    sync(partial)
    os.replace(partial, path)
