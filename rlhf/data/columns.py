"""Records as rows of the columns that a shard has, and blocks of such rows as Arrow tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache
from itertools import accumulate, chain, repeat
from operator import attrgetter
from typing import Any

from rlhf.core.lazy import pa
from rlhf.data.schema import Candidate, Message, Ranking, Record, content_hash, field_names

Row = tuple[Any, ...]
"""The values of a record in the order of `field_names` of its kind. Messages and candidates are tuples with the fields
of `Message` and `Candidate`.

An import of millions of rankings makes such rows instead of records, which take three times as long to make and to
write. Nothing is checked, so a row is only for what is known to be valid. A row without a kind is a ranking's.
"""

_RANKING = field_names(Ranking.kind)
_REST = tuple(field.default for field in fields(Ranking) if field.name in _RANKING[_RANKING.index("annotator") :])


def ranking_row(
    messages: Sequence[tuple[str, str]],
    texts: tuple[str, ...],
    candidates: Sequence[tuple[str, str, str, float | None]],
    ranks: tuple[int, ...],
    source: str,
) -> Row:
    """A ranking without annotator and time, whose messages, candidates (with their texts) and dense ranks are valid.

    Raises:
        TypeError: A text is not valid Unicode (a lone surrogate).
    """
    prompt_id = content_hash(messages)
    made_id = content_hash(prompt_id, texts, ranks, "", None)
    return (made_id, prompt_id, messages, source, None, None, candidates, ranks, *_REST)


def kinds_of(made: Iterable[Record | Row]) -> list[str]:
    """The kinds of records and rows, each once."""
    types: dict[type[Any], None] = dict.fromkeys(map(type, made))
    return list(dict.fromkeys(Ranking.kind if each is tuple else each.kind for each in types))


def as_record(made: Record | Row) -> Record:
    """The record of a ranking's row, which is checked; a record is returned as it is."""
    if not isinstance(made, tuple):
        return made
    given = dict(zip(_RANKING, made))
    given["messages"] = tuple(Message(*message) for message in given["messages"])
    given["candidates"] = tuple(Candidate(*candidate) for candidate in given["candidates"])
    del given["id"], given["prompt_id"]
    return Ranking(**given)


@cache
def arrow_schema(kind: str) -> pa.Schema:
    """The columns of a shard with records of the kind."""
    text, number = pa.string(), pa.float64()
    message = pa.struct([("role", text), ("content", text)])
    candidate = pa.struct([("text", text), ("author", text), ("author_kind", text), ("score", number)])
    other = {
        "messages": pa.list_(message), "candidates": pa.list_(candidate), "ranks": pa.list_(pa.int32()),
        "seconds": number, "shown": pa.bool_(), "weight": number, "merged": pa.list_(text),
    }  # fmt: skip
    return pa.schema([(name, other.get(name, text)) for name in field_names(kind)])


@cache
def _row_of(kind: str) -> Callable[[Record], Row]:
    return attrgetter(*field_names(kind))


class Block:
    """Rows of one kind, divided into columns once: for their number of characters, and as an Arrow table.

    Args:
        made: Records of the kind, and rows.
    """

    def __init__(self, made: Sequence[Record | Row], kind: str) -> None:
        row_of = _row_of(kind)
        self.rows: list[Row] = [each if type(each) is tuple else row_of(each) for each in made]  # type: ignore[arg-type]
        self._schema = arrow_schema(kind)
        columns = zip(*self.rows) if self.rows else repeat(())
        self._columns: dict[str, Sequence[Any]] = dict(zip(self._schema.names, columns))
        self._parts = {
            name: tuple(zip(*chain.from_iterable(self._columns[name]))) or ((),) * len(tuple_of._fields)
            for name, tuple_of in (("messages", Message), ("candidates", Candidate))
            if name in self._columns
        }
        """Name of a column of lists -> the values of each field in all lists, one after the other."""

    def splits(self) -> Counter[str | None]:
        """Split -> rows."""
        return Counter(self._columns["split"])

    def characters(self) -> int:
        """Number of characters of all messages and answers."""
        texts = [self._parts["messages"][1], self._parts.get("candidates", [()])[0], self._columns.get("answer", ())]
        return sum(map(len, chain.from_iterable(texts)))

    def table(self) -> pa.Table:
        """The rows as an Arrow table. Flat columns are ten times faster than `Table.from_pylist`."""
        columns = []
        for column in self._schema:
            values = self._columns[column.name]
            if column.name in self._parts:  # with the fields of Message or Candidate, in their order
                struct = column.type.value_type
                children = [_array(part, child.type) for part, child in zip(self._parts[column.name], struct)]
                offsets = pa.array([0, *accumulate(map(len, values))], pa.int32())
                flat = pa.StructArray.from_arrays(children, fields=list(struct))
                columns.append(pa.ListArray.from_arrays(offsets, flat))
            else:
                columns.append(_array(values, column.type))
        return pa.Table.from_arrays(columns, schema=self._schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except pa.ArrowInvalid:
        if not pa.types.is_floating(kind):
            raise
        return pa.array([None if value is None else float(value) for value in values], kind)  # integers of 54 bits
