"""What the brief check and a manifest's agreement need from a dataset, gathered while it is written or read once."""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.statistics.columns import (
    Collector,
    ColumnArrays,
    Columns,
    as_shards,
    column,
    list_sizes,
    row_groups,
    where,
)
from data_tools.statistics.judgements import pairs_of
from rlhf.data.store import Dataset

READ = ["id", "prompt_id", "split", "candidates", "answer", "author", "ranks", "annotator", "merged"]
MOST_PROMPTS = 50_000
"""Of more prompts than these that were ranked repeatedly, those with the smallest ids (random hashes) are used."""


class Accumulator:
    """Counts of a dataset, and its rankings as arrays in a temporary file, 80 bytes for a ranking of two answers.

    Args:
        brief: Gather what the brief check needs. Without it only rankings by named annotators are kept, which is
            enough for the agreement and costs almost nothing if no annotator is named.
    """

    def __init__(self, brief: bool = True) -> None:
        self.brief = brief
        self.sizes: Counter[int] = Counter()
        """Number of answers -> records."""
        self.tied = self.pairs = self.longer = self.unequal = 0
        """Pairs of different answers: ranked equal, all, won by the longer answer, ordered and of unequal length."""
        self.columns: list[str] = []
        """Names of the last table's columns; `ranks` is among them for rankings."""
        self._collector = Collector()
        self._parts: list[list[str]] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the accumulator
        weakref.finalize(self, self._file.close)

    def add(self, table: pa.Table) -> None:
        """Add a table of records with the columns of a shard, each in one chunk."""
        self.columns = table.column_names
        if not self.brief:
            if "ranks" not in self.columns or not (named := _named(table)).any():
                return
            table = table.filter(pa.array(named)).combine_chunks()
        part = self._collector.arrays(table.select([name for name in READ if name in self.columns]))
        self.sizes.update(part["size"].tolist())
        if self.brief and len(part["id"]) and "ranks" in self.columns:
            pairs = pairs_of(self._collector.columns([dict(part)]))
            longer = np.sign(np.subtract(*pairs.both(pairs.columns.chars))) * pairs.order
            self.tied, self.pairs = self.tied + int((pairs.order == 0).sum()), self.pairs + len(pairs)
            self.longer, self.unequal = self.longer + int((longer > 0).sum()), self.unequal + int((longer != 0).sum())
        self._parts.append(list(part))
        for values in part.values():
            np.save(self._file, values)

    @property
    def records(self) -> int:
        return self.sizes.total()

    def distinct(self, name: str) -> int:
        """The number of different values of `id` or `prompt`."""
        return len(np.unique(np.concatenate([np.zeros(0, np.uint64), *(part[name] for part in self._read())])))

    def ranked_repeatedly(self, named: bool = True) -> Columns | None:
        """The rankings of prompts that have more than one; None if there are none, and for other kinds of records.

        Of more than `MOST_PROMPTS` such prompts, those with the smallest ids are used.

        Args:
            named: Count only rankings by named annotators. Aggregated rankings never count.
        """
        if "ranks" not in self.columns or not self._parts:
            return None
        prompts = [np.zeros(0, np.uint64)]
        for part in self._read():
            columns = self._collector.columns([part])
            prompts.append(columns.prompt[columns.by_named_annotator if named else ~columns.merged])
        known, times = np.unique(np.concatenate(prompts), return_counts=True)
        wanted = known[times > 1][:MOST_PROMPTS]
        if not len(wanted):
            return None
        return self._collector.columns(where(part, np.isin(part["prompt"], wanted)) for part in self._read())

    def _read(self) -> Iterator[ColumnArrays]:
        self._file.seek(0)
        yield from ({name: np.load(self._file) for name in names} for names in self._parts)


def _named(table: pa.Table) -> np.ndarray:
    """(N,) bool: rankings by one annotator whose name is known."""
    named = pc.not_equal(column(table, "annotator"), "").to_numpy(zero_copy_only=False)
    return named & (list_sizes(column(table, "merged")) == 0)


def accumulated(dataset: Dataset) -> Accumulator:
    """The accumulator of a dataset on disk, in one pass.

    Raises:
        UserError: The dataset cannot be read.
    """
    gathered = Accumulator()
    with as_shards(dataset) as shards:
        for group in row_groups(shards):
            gathered.add(group.read(READ))
    return gathered
