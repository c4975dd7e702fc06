"""Writes a dataset folder as a stream of records. It appears under its name only when it is complete."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf.core.errors import UserError
from rlhf.core.files import partial_path, whole_folder, write_json
from rlhf.core.lazy import pa, pq
from rlhf.data.columns import Block, Row, arrow_schema, kinds_of
from rlhf.data.manifest import file_hash, known_kind
from rlhf.data.schema import SCHEMA_VERSION, BadRecord, Record

ROWS_PER_SHARD = 200_000
ROWS_PER_GROUP = 5_000
ROWS_PER_TABLE, CHARS_PER_TABLE = 1_000, 4_000_000  # at most converted to Arrow together; with 200 rows 6% slower
FIRST_TABLE = 200  # rows, while their length is unknown
CHARS_PER_GROUP = 32_000_000  # bounds memory, and keeps columns of long texts below Arrow's 2 GiB


class Observer(Protocol):
    """Sees a dataset's tables while they are written, and adds what it found to the manifest."""

    def add(self, table: pa.Table) -> None:
        """Take the next records, with the columns of a shard, each in one chunk."""

    def facts(self) -> dict[str, Any]:
        """Entries for the manifest, after the last table."""


class DatasetWriter:
    """Write a dataset folder as a stream.

    A context manager. Records go to Parquet shards in a hidden folder, the manifest is written last, and leaving the
    block renames the folder. An exception leaves nothing behind. The same records and origin give the same bytes.

    Args:
        path: The folder to create.
        kind: prompt, demonstration, proposal or ranking. None means the kind of the first record.
        origin: Where the records came from (any JSON), saved in the manifest under `origin`. More may be added to
            `self.origin` until the block ends.
        observer: Receives every Arrow table of records once, so that the dataset need not be read again.
        overwrite: Replace a dataset of that name.

    Raises:
        UserError: The folder exists, another process is writing it, it cannot be written, or `kind` is None and no
            record was written.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str | None,
        origin: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
        overwrite: bool = False,
    ) -> None:
        self._observer, self._overwrite = observer, overwrite
        self.path, self.origin = Path(path), dict(origin or {})
        self.kind = None if kind is None else known_kind(kind)
        self.partial = partial_path(self.path.resolve())
        """The hidden folder. Files written there before the block ends become part of the dataset folder."""
        self.count = 0
        self._closing = ExitStack()
        self._splits: Counter[str] = Counter()
        self._waiting: list[Record | Row] = []
        self._tables: list[pa.Table] = []
        self._in_group = self._chars = 0
        self.table_rows = FIRST_TABLE
        """How many records to pass to `write_all` next: many, but few where the last ones were long."""
        self._shards: list[dict[str, Any]] = []
        self._file: pq.ParquetWriter | None = None
        self._thread = ThreadPoolExecutor(1)  # compresses one row group while the next is read
        self._writing: Future[None] | None = None
        self._in_shard = 0

    def __enter__(self) -> DatasetWriter:
        with self._write_errors():
            if self.path.resolve() == Path.cwd():
                raise UserError(f"{self.path}: is the current folder", remedy="Choose another --out.")
            check_new(self.path, self._overwrite)
            whole = (self.path / "manifest.json").is_file()
            if self.path.exists() and not whole and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path}: exists and is not a dataset", remedy="Choose another --out.")
            self._closing.enter_context(whole_folder(self.path))
            self._closing.callback(self._thread.shutdown)
            try:
                check_new(self.path, self._overwrite)  # another process may have made it since
            except UserError:
                self._closing.__exit__(*sys.exc_info())
                raise
        return self

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Free disk space, or choose another --out."
            raise UserError(f"{self.path}: cannot be written: {error}", remedy=remedy) from None

    def write(self, record: Record) -> None:
        """Add one record of the writer's kind.

        Raises:
            BadRecord: The record is of another kind.
        """
        self._check_kind(record.kind)
        self._waiting.append(record)
        self.count += 1
        if len(self._waiting) >= self.table_rows:
            self._add_waiting()

    def write_all(self, records: Sequence[Record | Row]) -> None:
        """Add records of the writer's kind; faster than one by one.

        Raises:
            BadRecord: A record is of another kind.
        """
        for kind in kinds_of(records):
            self._check_kind(kind)
        self._waiting += records
        self.count += len(records)
        self._add_waiting()

    def _check_kind(self, kind: str) -> None:
        if kind != self.kind:
            if self.kind is not None:
                raise BadRecord(f"a {kind} in a dataset of {self.kind}s")
            self.kind = kind

    def _add_waiting(self) -> None:
        made, self._waiting = self._waiting, []
        while made:
            size = min(self.table_rows, ROWS_PER_GROUP - self._in_group)
            self._add(made[:size])
            made = made[size:]

    def _add(self, made: Sequence[Record | Row]) -> None:
        """Add records to the group, for which it has room, and write it where it is full."""
        assert self.kind is not None
        block = Block(made, self.kind)
        chars = block.characters()
        self.table_rows = max(1, min(ROWS_PER_TABLE, CHARS_PER_TABLE * len(made) // max(chars, 1)))
        fit = self._chars + chars < CHARS_PER_GROUP
        if not fit and len(made) > 1:
            half = len(made) // 2
            self._add(made[:half])
            self._add(made[half:])
            return
        self._tables.append(block.table())
        self._splits.update({split or "none": count for split, count in block.splits().items()})
        self._in_group += len(made)
        self._chars += chars
        if self._in_group == ROWS_PER_GROUP or not fit:
            with self._write_errors():
                self._flush()

    def _flush(self) -> None:
        assert self.kind is not None
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.parquet"
            self._file = pq.ParquetWriter(self.partial / name, arrow_schema(self.kind), compression="zstd")
            self._shards.append({"file": name})
        table = pa.concat_tables(self._tables).combine_chunks()
        if self._observer is not None:
            self._observer.add(table)
        self._wait()
        self._writing = self._thread.submit(self._file.write_table, table)
        self._in_shard += self._in_group
        self._tables, self._in_group, self._chars = [], 0, 0
        if self._in_shard >= ROWS_PER_SHARD:
            self._close_shard()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._wait()
        self._file.close()
        sha256 = file_hash(self.partial / self._shards[-1]["file"])
        self._shards[-1] |= {"rows": self._in_shard, "sha256": sha256}
        self._file, self._in_shard = None, 0

    def __exit__(self, *error: Any) -> None:
        with self._write_errors(), self._closing:
            if error[0] is None:
                self._finish()
            else:
                self._closing.__exit__(*error)

    def _finish(self) -> None:
        if self.kind is None:
            raise UserError(f"{self.path}: there are no records to write")
        self._add_waiting()
        if not self.count:
            self._add([])
        if self._tables:
            self._flush()
        if self._file is not None:
            self._close_shard()
        manifest = {"schema_version": SCHEMA_VERSION, "kind": self.kind, "count": self.count}
        manifest |= {"splits": self._splits, "shards": self._shards, "origin": self.origin}
        manifest |= {} if self._observer is None else self._observer.facts()
        write_json(self.partial / "manifest.json", manifest)


def check_new(
    path: str | Path, overwrite: bool, remedy: str = "Replace it with --overwrite, or choose another --out."
) -> None:
    """Refuse to replace a dataset, unless `overwrite`.

    Raises:
        UserError: There is a dataset of that name.
    """
    if not overwrite and (Path(path) / "manifest.json").is_file():
        raise UserError(f"{path}: a dataset is there already", remedy=remedy)
