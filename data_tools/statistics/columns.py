"""A dataset as columns of numbers: what the statistics need of millions of records, about 100 bytes each.

Prompts, records and answers are 64-bit hashes here. Their texts are read row group by row group, hashed and dropped.
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
from rlhf.data.schema import AUTHOR_KINDS, SPLITS
from rlhf.data.store import Dataset, DatasetWriter, OnReject, open_dataset


@dataclass(frozen=True)
class Columns:
    """N records with M answers in all. The answers of record `i` are `start[i]` to `start[i + 1]`."""

    id: np.ndarray
    """(N,) uint64."""
    prompt: np.ndarray
    """(N,) uint64, the prompt's id."""
    split: np.ndarray
    """(N,) int8, index into `SPLITS`, -1 where there is none."""
    prompt_chars: np.ndarray
    """(N,) int32, characters of all turns."""
    annotator: np.ndarray
    """(N,) int32, index into `annotators`; the name is empty where nobody is named."""
    seconds: np.ndarray
    """(N,) float32, NaN where unknown."""
    shown: np.ndarray
    """(N,) bool: the answers stand in the order that the annotator saw."""
    merged: np.ndarray
    """(N,) bool: aggregated from other rankings, so no person's."""
    start: np.ndarray
    """(N + 1,) int64."""
    answer: np.ndarray
    """(M,) uint64, a hash of the text."""
    chars: np.ndarray
    """(M,) int32, characters of the answer."""
    rank: np.ndarray
    """(M,) int32, 1 = best; 0 where the dataset has no ranks."""
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
        """(N,) how many answers each record has."""
        return np.diff(self.start)

    @property
    def by_named_person(self) -> np.ndarray:
        """(N,) bool: a ranking that a person made whose name is known."""
        named = np.array([name != "" for name in self.annotators], bool)
        return named[self.annotator] & ~self.merged


@contextmanager
def as_shards(dataset: Dataset, on_reject: OnReject | None = None) -> Iterator[Dataset]:
    """The dataset as a folder of shards: itself, or a JSONL file's records in a temporary one."""
    if dataset.path.is_dir():
        yield dataset
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as folder:
        place = Path(folder) / "records"
        with DatasetWriter(place, dataset.kind) as writer:
            for record in dataset.records(on_reject=on_reject):
                writer.write(record)
        yield open_dataset(place)


@dataclass(frozen=True)
class Group:
    """A row group of a shard: some thousand records."""

    path: Path
    file: pq.ParquetFile
    number: int

    def __len__(self) -> int:
        return self.file.metadata.row_group(self.number).num_rows

    def read(self, names: list[str] | None = None) -> pa.Table:
        """Its columns, each in one piece. Those that an older dataset lacks are left out.

        Raises:
            UserError: The shard is damaged.
        """
        there = self.file.schema_arrow.names
        wanted = there if names is None else [name for name in names if name in there]
        try:
            return self.file.read_row_group(self.number, columns=wanted, use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from None


def row_groups(dataset: Dataset) -> Iterator[Group]:
    """Every row group of a dataset folder, in order.

    Raises:
        UserError: A shard is damaged.
    """
    for shard in dataset.manifest["shards"]:
        path = dataset.path / shard["file"]
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        with file:
            yield from (Group(path, file, number) for number in range(file.num_row_groups))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged: {error}", remedy="Import the data again, or bring the file back from a copy.")


def column(table: pa.Table, name: str) -> pa.Array:
    """The one chunk of a column that is there."""
    chunks = table.column(name).chunks
    return chunks[0] if chunks else pa.array([], table.schema.field(name).type)


def hex_numbers(ids: pa.Array) -> np.ndarray:
    """Ids of 16 hex digits as uint64.

    Raises:
        UserError: One is not of 16 digits.
    """
    lengths = pc.binary_length(ids)
    if len(ids) and not (pc.min(lengths).as_py() == pc.max(lengths).as_py() == 16):
        raise UserError("an id is not of 16 hex digits", remedy="`rlhf data validate` lists such rows.")
    offset = ids.offset * 16
    digits = np.frombuffer(ids.buffers()[2] or b"", np.uint8)[offset : offset + 16 * len(ids)].reshape(-1, 16)
    nibbles = np.where(digits > ord("9"), digits - (ord("a") - 10), digits - ord("0")).astype(np.uint8)
    return ((nibbles[:, ::2] << 4) | nibbles[:, 1::2]).copy().view(">u8").ravel().astype(np.uint64)


def text_hashes(texts: pa.Array) -> np.ndarray:
    """(M,) uint64: the first 8 bytes of each text's BLAKE2b."""
    values = texts.cast(pa.binary()).to_numpy(zero_copy_only=False)
    digests = b"".join([hashlib.blake2b(value, digest_size=8).digest() for value in values])
    return np.frombuffer(digests, "<u8")


class Coder:
    """Numbers for names, the same over all row groups."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, names: pa.Array) -> np.ndarray:
        coded = pc.dictionary_encode(pc.fill_null(names, ""))
        table = np.array(
            [self.numbers.setdefault(n, len(self.numbers)) for n in coded.dictionary.to_pylist()], np.int32
        )
        return table[coded.indices.to_numpy()] if len(names) else np.zeros(0, np.int32)


Part = dict[str, "np.ndarray"]
"""Some records' arrays by the names that they have in `Columns`, with `size`, answers a record, for `start`."""
PER_ANSWER = ("answer", "chars", "rank", "author", "author_kind")


class Collector:
    """Turns tables of records into `Columns`, one table after the other."""

    def __init__(self) -> None:
        self._annotators, self._authors = Coder(), Coder()

    def columns(self, parts: Iterable[Part]) -> Columns:
        """The records of all parts.

        Raises:
            UserError: There are none.
        """
        parts = list(parts)
        if not sum(len(part["id"]) for part in parts):
            raise UserError("no record there", remedy="`rlhf data stats` shows what a dataset holds.")
        whole: dict[str, Any] = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
        whole["start"] = np.concatenate([[0], np.cumsum(whole.pop("size"))])
        return Columns(**whole, annotators=list(self._annotators.numbers), authors=list(self._authors.numbers))

    def part(self, table: pa.Table) -> Part:
        """The arrays of a table of records as the shards hold them. A column that is left out counts as unknown."""
        rows, names = table.num_rows, set(table.column_names)
        part = {"id": hex_numbers(column(table, "id")), "prompt": hex_numbers(column(table, "prompt_id"))}
        part["split"] = _positions(column(table, "split"), SPLITS)
        part["prompt_chars"] = np.zeros(rows, np.int32)
        if "messages" in names:
            turns = column(table, "messages")
            part["prompt_chars"] = _sums(_lengths(turns.flatten().field("content")), turns)
        part["annotator"] = self._annotators(_or_empty(table, "annotator"))
        part["seconds"] = np.full(rows, np.nan, np.float32)
        if "seconds" in names:
            part["seconds"] = column(table, "seconds").to_numpy(zero_copy_only=False).astype(np.float32)
        for name in ("shown", "merged"):
            part[name] = np.zeros(rows, bool)
        if "shown" in names:
            part["shown"] = pc.fill_null(column(table, "shown"), False).to_numpy(zero_copy_only=False)
        if "merged" in names:
            part["merged"] = pc.fill_null(pc.list_value_length(column(table, "merged")), 0).to_numpy() > 0
        return part | self._answers(table)

    def _answers(self, table: pa.Table) -> Part:
        names, rows = set(table.column_names), table.num_rows
        if "candidates" in names:
            lists = column(table, "candidates")
            answers, sizes = lists.flatten(), pc.list_value_length(lists).to_numpy()
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
            "author_kind": _positions(kinds, AUTHOR_KINDS),
        }  # fmt: skip


def where(part: Part, chosen: np.ndarray) -> Part:
    """The records of a part that a (N,) bool mask chooses."""
    answers = np.repeat(chosen, part["size"])
    return {name: values[answers if name in PER_ANSWER else chosen] for name, values in part.items()}


def _or_empty(table: pa.Table, name: str) -> pa.Array:
    return column(table, name) if name in table.column_names else pa.array([""] * table.num_rows)


def _positions(values: pa.Array, names: tuple[str, ...]) -> np.ndarray:
    """(N,) int8: where each value stands among the names, -1 for none of them."""
    return pc.fill_null(pc.index_in(values, pa.array(names)), -1).to_numpy().astype(np.int8)


def _lengths(texts: pa.Array) -> np.ndarray:
    return pc.utf8_length(texts).to_numpy().astype(np.int32)


def _sums(values: np.ndarray, lists: pa.Array) -> np.ndarray:
    """(N,) int32: the sum of each list's values."""
    sizes = pc.list_value_length(lists).to_numpy()
    ends = np.cumsum(sizes)
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return (total[ends] - total[ends - sizes]).astype(np.int32)
