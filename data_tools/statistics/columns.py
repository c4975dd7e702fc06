"""A dataset as arrays of numbers, about 100 bytes a record, so that millions of records fit into memory.

Ids and answers are 64-bit hashes. Texts are read one row group at a time, hashed and dropped.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlhf.core.errors import UserError
from rlhf.data.jsonl import OnReject
from rlhf.data.schema import AUTHOR_KINDS, SPLITS
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import DatasetWriter

ColumnArrays = dict[str, np.ndarray]
"""Arrays of some records by their names in `Columns`, with `size`, the answers of each record, in place of `start`."""
PER_ANSWER = ("answer", "chars", "rank", "author", "author_kind")


@dataclass(frozen=True)
class Columns:
    """N records with M answers in all. The answers of record i are `start[i]` to `start[i + 1]`."""

    id: np.ndarray
    """(N,) uint64."""
    prompt: np.ndarray
    """(N,) uint64, the prompt's id."""
    split: np.ndarray
    """(N,) int8, index into `SPLITS`, -1 for none."""
    prompt_chars: np.ndarray
    """(N,) int32, characters of all turns."""
    annotator: np.ndarray
    """(N,) int32, index into `annotators`; the name is empty if the record has none."""
    seconds: np.ndarray
    """(N,) float32, NaN if unknown."""
    shown: np.ndarray
    """(N,) bool: the answers are in the order in which the annotator saw them."""
    merged: np.ndarray
    """(N,) bool: aggregated from other rankings, so not the judgement of one annotator."""
    start: np.ndarray
    """(N + 1,) int64."""
    answer: np.ndarray
    """(M,) uint64, a hash of the text."""
    chars: np.ndarray
    """(M,) int32, characters of the answer."""
    rank: np.ndarray
    """(M,) int32, 1 = best; 0 if the dataset has no ranks."""
    author: np.ndarray
    """(M,) int32, index into `authors`."""
    author_kind: np.ndarray
    """(M,) int8, index into `AUTHOR_KINDS`."""
    annotators: list[str]
    authors: list[str]

    def __len__(self) -> int:
        return len(self.id)

    @property
    def sizes(self) -> np.ndarray:
        """(N,) number of answers of each record."""
        return np.diff(self.start)

    @property
    def by_named_annotator(self) -> np.ndarray:
        """(N,) bool: a ranking by one annotator whose name is known."""
        return np.array([name != "" for name in self.annotators], bool)[self.annotator] & ~self.merged


# ---- reading shards -------------------------------------------------------------------------------------------------


@contextmanager
def as_shards(dataset: Dataset, on_reject: OnReject | None = None) -> Iterator[Dataset]:
    """The dataset as a folder of shards; the records of a JSONL file are written to a temporary one."""
    if dataset.path.is_dir():
        yield dataset
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as folder:
        with DatasetWriter(Path(folder) / "records", dataset.kind) as writer:
            for record in dataset.records(on_reject=on_reject):
                writer.write(record)
        yield open_dataset(writer.path)


@dataclass(frozen=True)
class RowGroup:
    """Some thousand records of a shard."""

    path: Path
    file: pq.ParquetFile
    index: int

    def __len__(self) -> int:
        return self.file.metadata.row_group(self.index).num_rows

    def read(self, names: list[str] | None = None) -> pa.Table:
        """The columns of these names (all by default) that the shard has, each in one chunk.

        Raises:
            UserError: The shard is damaged.
        """
        existing = self.file.schema_arrow.names  # an older schema version has fewer
        wanted = existing if names is None else [name for name in names if name in existing]
        try:
            return self.file.read_row_group(self.index, columns=wanted, use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from None


def row_groups(dataset: Dataset) -> Iterator[RowGroup]:
    """Every row group of a dataset folder, in order.

    Raises:
        UserError: A shard is damaged or differs from the manifest.
    """
    for shard in dataset.manifest["shards"]:
        path = dataset.path / shard["file"]
        dataset.verify(shard)
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        with file:
            yield from (RowGroup(path, file, index) for index in range(file.num_row_groups))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged: {error}", remedy="Import the data again, or restore the file from a copy.")


# ---- tables to arrays -----------------------------------------------------------------------------------------------


MISSING = {
    "messages": pa.list_(pa.struct({"content": pa.string()})), "annotator": pa.string(), "seconds": pa.float32(),
    "shown": pa.bool_(), "merged": pa.list_(pa.string()),
}  # fmt: skip
"""Columns that a table may lack, since its kind of record or its version of the schema has none -> their types."""


def column(table: pa.Table, name: str) -> pa.Array:
    """A column of one chunk; nulls where the table lacks it."""
    if name not in table.column_names and name in MISSING:
        return pa.nulls(len(table), MISSING[name])
    chunks = table.column(name).chunks
    return chunks[0] if chunks else pa.array([], table.schema.field(name).type)


def hex_numbers(ids: pa.Array) -> np.ndarray:
    """Ids of 16 hex digits as (N,) uint64.

    Raises:
        UserError: An id has another length.
    """
    lengths = pc.binary_length(ids)
    if len(ids) and not (pc.min(lengths).as_py() == pc.max(lengths).as_py() == 16):
        raise UserError("an id does not have 16 hex digits", remedy="Find such rows with `rlhf data validate`.")
    digits = "".join(ids.to_pylist())
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)


def text_hashes(texts: pa.Array) -> np.ndarray:
    """(M,) uint64: the first 8 bytes of each text's BLAKE2b."""
    values = texts.cast(pa.binary()).to_numpy(zero_copy_only=False)
    digests = b"".join([hashlib.blake2b(value, digest_size=8).digest() for value in values])
    return np.frombuffer(digests, "<u8")


class NameCodes:
    """Integer codes for names, consistent over all row groups."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def __call__(self, names: pa.Array) -> np.ndarray:
        encoded = pc.dictionary_encode(pc.fill_null(names, ""))
        codes = [self.codes.setdefault(name, len(self.codes)) for name in encoded.dictionary.to_pylist()]
        return np.array(codes, np.int32)[encoded.indices.to_numpy()] if len(names) else np.zeros(0, np.int32)


class Collector:
    """Turns tables of records into `Columns`, one table after the other."""

    def __init__(self) -> None:
        self._annotators, self._authors = NameCodes(), NameCodes()

    def columns(self, parts: Iterable[ColumnArrays]) -> Columns:
        """The records of all parts, which are emptied.

        Raises:
            UserError: There are none.
        """
        parts = list(parts)
        if not sum(len(part["id"]) for part in parts):
            raise UserError("the dataset has no records", remedy="`rlhf data stats` shows what a dataset holds.")
        whole: dict[str, Any] = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
        whole["start"] = np.concatenate([[0], np.cumsum(whole.pop("size"))])
        return Columns(**whole, annotators=list(self._annotators.codes), authors=list(self._authors.codes))

    def arrays(self, table: pa.Table) -> ColumnArrays:
        """The arrays of a table with the columns of a shard. What a missing column would hold is unknown."""
        turns = column(table, "messages")
        return self._answers(table) | {
            "id": hex_numbers(column(table, "id")),
            "prompt": hex_numbers(column(table, "prompt_id")),
            "split": _indices(column(table, "split"), SPLITS),
            "prompt_chars": np.bincount(
                pc.list_parent_indices(turns), _lengths(turns.flatten().field("content")), len(turns)
            ).astype(np.int32),
            "annotator": self._annotators(column(table, "annotator")),
            "seconds": column(table, "seconds").to_numpy(zero_copy_only=False).astype(np.float32),
            "shown": pc.fill_null(column(table, "shown"), False).to_numpy(zero_copy_only=False),
            "merged": list_sizes(column(table, "merged")) > 0,
        }

    def _answers(self, table: pa.Table) -> ColumnArrays:
        names, rows = set(table.column_names), table.num_rows
        if "candidates" in names:
            lists = column(table, "candidates")
            answers, sizes = lists.flatten(), list_sizes(lists)
            texts, authors, kinds = (answers.field(name) for name in ("text", "author", "author_kind"))
        elif "answer" in names:
            texts, authors, sizes = column(table, "answer"), column(table, "author"), np.ones(rows, np.int64)
            kinds = pa.array(["person"] * rows)
        else:
            texts = authors = kinds = pa.array([], pa.string())
            sizes = np.zeros(rows, np.int64)
        ranks = column(table, "ranks").flatten().to_numpy() if "ranks" in names else np.zeros(len(texts))
        return {
            "size": sizes.astype(np.int64), "answer": text_hashes(texts), "chars": _lengths(texts),
            "rank": ranks.astype(np.int32), "author": self._authors(authors),
            "author_kind": _indices(kinds, AUTHOR_KINDS),
        }  # fmt: skip


def where(part: ColumnArrays, chosen: np.ndarray) -> ColumnArrays:
    """The records of a part that a (N,) bool mask chooses."""
    answers = np.repeat(chosen, part["size"])
    return {name: values[answers if name in PER_ANSWER else chosen] for name, values in part.items()}


def _indices(values: pa.Array, names: tuple[str, ...]) -> np.ndarray:
    """(N,) int8: the index of each value among the names, -1 for none of them."""
    return pc.fill_null(pc.index_in(values, pa.array(names)), -1).to_numpy().astype(np.int8)


def _lengths(texts: pa.Array) -> np.ndarray:
    return pc.utf8_length(texts).to_numpy().astype(np.int32)


def list_sizes(lists: pa.Array) -> np.ndarray:
    """(N,) the length of each list; 0 for a null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
