"""Records as rows of the columns that a shard has, and blocks of such rows as Arrow tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.core.lazy import lazy
from rlhf.data.schema import Candidate, Message, Ranking, Record, content_hash

if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = lazy("pyarrow")

Row = tuple[Any, ...]
"""The values of a record in the order of its kind's columns."""


class RankingRow(NamedTuple):
    """A ranking as the row that a shard holds. Its messages and candidates are tuples with the fields of theirs.

    An import of millions of rows makes these instead of records, which take three times as long to make and to write.
    Nothing is checked, so it is only for what is known to be valid.
    """

    id: str
    prompt_id: str
    messages: Sequence[tuple[str, str]]
    source: str
    group: str | None
    split: str | None
    candidates: Sequence[tuple[str, str, str, float | None]]
    ranks: tuple[int, ...]
    annotator: str = ""
    time: str | None = None
    seconds: float | None = None
    shown: bool = False
    weight: float = 1.0
    merged: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return Ranking.kind

    def record(self) -> Ranking:
        """The same as a record, which checks it."""
        given = {name: value for name, value in self._asdict().items() if name not in ("id", "prompt_id")}
        given["messages"] = tuple(Message(*message) for message in self.messages)  # type: ignore[arg-type]
        given["candidates"] = tuple(Candidate(*candidate) for candidate in self.candidates)  # type: ignore[arg-type]
        return Ranking(**given)


_ranking_row = partial(tuple.__new__, RankingRow)  # a third of the time of `RankingRow(...)`
_REST = tuple(RankingRow._field_defaults.values())


def ranking_row(
    messages: Sequence[tuple[str, str]],
    candidates: Sequence[tuple[str, str, str, float | None]],
    ranks: tuple[int, ...],
    source: str,
) -> RankingRow:
    """A ranking without annotator and time, whose messages, candidates and dense ranks are valid.

    Raises:
        TypeError: A text is not valid Unicode (a lone surrogate).
    """
    prompt_id = content_hash(messages)
    made_id = content_hash(prompt_id, [candidate[0] for candidate in candidates], ranks, "", None)
    return _ranking_row((made_id, prompt_id, messages, source, None, None, candidates, ranks, *_REST))


def as_record(made: Record | RankingRow) -> Record:
    """The record of a row; a record is returned as it is."""
    return made.record() if isinstance(made, RankingRow) else made


@cache
def arrow_schema(kind: str) -> pa.Schema:
    """The columns of a shard with records of the kind."""
    text = pa.string()
    fields = [("id", text), ("prompt_id", text)]
    fields += [("messages", pa.list_(pa.struct([("role", text), ("content", text)])))]
    fields += [("source", text), ("group", text), ("split", text)]
    if kind == "demonstration":
        fields += [("answer", text), ("author", text)]
    if kind in ("proposal", "ranking"):
        candidate = pa.struct([("text", text), ("author", text), ("author_kind", text), ("score", pa.float64())])
        fields += [("candidates", pa.list_(candidate))]
    if kind == "ranking":
        fields += [("ranks", pa.list_(pa.int32())), ("annotator", text), ("time", text)]
        fields += [("seconds", pa.float64()), ("shown", pa.bool_()), ("weight", pa.float64())]
        fields += [("merged", pa.list_(text))]
    return pa.schema(fields)


@cache
def _row_of(kind: str) -> Callable[[Record], Row]:
    return attrgetter(*arrow_schema(kind).names)


def rows_of(records: Sequence[Record | RankingRow], kind: str) -> list[Row]:
    """The rows of records of one kind."""
    row_of = _row_of(kind)
    return [record if type(record) is RankingRow else row_of(record) for record in records]  # type: ignore[arg-type]


def splits_of(rows: Sequence[Row]) -> Iterator[str | None]:
    """The split of each row."""
    return map(itemgetter(RankingRow._fields.index("split")), rows)  # the same place in every kind


def characters(rows: Sequence[Row], kind: str) -> int:
    """Number of characters of all messages and answers."""
    names = arrow_schema(kind).names
    texts = [map(itemgetter(1), _flat(rows, names.index("messages")))]
    if "candidates" in names:
        texts.append(map(itemgetter(0), _flat(rows, names.index("candidates"))))
    if "answer" in names:
        texts.append(map(itemgetter(names.index("answer")), rows))
    return sum(map(len, chain.from_iterable(texts)))


def _flat(rows: Sequence[Row], column: int) -> Iterator[Any]:
    return chain.from_iterable(map(itemgetter(column), rows))


def arrow_table(rows: Sequence[Row], kind: str) -> pa.Table:
    """The rows as an Arrow table. Flattening nested lists here is ten times faster than `Table.from_pylist`."""
    schema = arrow_schema(kind)
    columns = []
    for column, values in zip(schema, zip(*rows) if rows else [()] * len(schema)):
        if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
            struct = column.type.value_type  # with the fields of Message or Candidate, in their order
            parts = zip(*chain.from_iterable(values)) if rows else [()] * struct.num_fields
            children = [_array(part, child.type) for part, child in zip(parts, struct)]
            offsets = pa.array([0, *accumulate(map(len, values))], pa.int32())
            columns.append(pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(children, fields=list(struct))))
        else:
            columns.append(_array(values, column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):  # an integer may be too large for Arrow's 64 bits
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, kind)
