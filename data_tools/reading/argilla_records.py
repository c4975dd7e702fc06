"""The forms in which Argilla exports records: flat or nested, by question or by person, of 2.x and 1.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_tools.reading.annotation_exports import person
from data_tools.reading.fields import is_list_of
from rlhf.data.schema import BadRecord, brief

NO_FIELDS = {
    "id", "status", "inserted_at", "updated_at", "_server_id", "external_id", "metadata", "suggestions", "vectors",
}  # fmt: skip
"""Keys of a flat record that are no field of it."""


class Response(NamedTuple):
    """What one person answered to one question."""

    question: str
    value: Any
    user: str
    status: Any
    time: Any = None


def records_of(row: Any) -> list[Mapping[str, Any]]:
    """The records of a row: itself, unless it is the object that to_dict gives, by column or by record id.

    Raises:
        BadRecord: It is no record, or its columns differ in length.
    """
    if not isinstance(row, dict) or not row:
        raise BadRecord("not a record", brief(row), "Export with to_list, to_dict or to_json, or to the Hub.")
    if isinstance(row.get("id"), list):
        columns = list(row.values())
        if not row["id"] or any(not isinstance(column, list) or len(column) != len(row["id"]) for column in columns):
            raise BadRecord("not columns of one length", brief({name: type(row[name]).__name__ for name in row}))
        return [dict(zip(row, values)) for values in zip(*columns)]
    if all(isinstance(value, dict) and ("fields" in value or _has_lists(value)) for value in row.values()):
        return list(row.values())
    return [row]


def _has_lists(record: Mapping[str, Any]) -> bool:
    return any(name.endswith(".responses") for name in record)


def fields_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a record, without its questions."""
    if isinstance(record.get("fields"), dict):
        return record["fields"]
    plain = (
        (name, value) for name, value in record.items() if name not in NO_FIELDS and isinstance(value, (str, list))
    )
    return {
        name: value
        for name, value in plain
        if ".responses" not in name and ".suggestion" not in name and not is_column(value)
    }


def responses_of(record: Mapping[str, Any]) -> Iterator[Response]:
    """The responses of all persons to all questions of a record, in whichever form it has them.

    Raises:
        BadRecord: They are in none of these forms.
    """
    nested = record.get("responses")
    if isinstance(nested, dict):
        for question, given in nested.items():
            yield from _column(question, given)
    elif isinstance(nested, list):
        for given in nested:
            yield from _of_person(given)
    elif _has_lists(record):
        for name, values in record.items():
            if name.endswith(".responses") and values is not None:
                columns = (values, record.get(f"{name}.users"), record.get(f"{name}.status"))
                yield from _parallel(name.removesuffix(".responses"), *columns)
    else:
        for name, value in record.items():
            if is_column(value):
                yield from _column(name, value)


def _parallel(question: str, values: Any, users: Any, status: Any) -> Iterator[Response]:
    if not isinstance(values, list):
        raise BadRecord("the responses of a question are not a list", f"{brief(question)}: {brief(values)}")
    users = [None] * len(values) if users is None else users
    status = [None] * len(values) if status is None else status
    if any(not isinstance(column, list) or len(column) != len(values) for column in (users, status)):
        raise BadRecord("the lists of responses, users and status differ in length", brief(question))
    for value, user, state in zip(values, users, status):
        yield Response(question, value, person(user), state)


def is_column(value: Any) -> bool:
    """Whether it is a 1.x question: a list of {user_id, value, status}, or an object of such lists."""
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(isinstance(row, dict) and row.keys() >= {"user_id", "value", "status"} for row in rows)


def _column(question: str, given: Any) -> Iterator[Response]:
    if isinstance(given, dict):
        yield from _parallel(question, given.get("value"), given.get("user_id"), given.get("status"))
        return
    if not is_list_of(dict, given):
        raise BadRecord("the responses of a question are not a list", f"{brief(question)}: {brief(given)}")
    for response in given:
        yield Response(question, response.get("value"), person(response.get("user_id")), response.get("status"))


def _of_person(given: Any) -> Iterator[Response]:
    """The responses of one person to all questions; one without a question where there are none."""
    if not isinstance(given, dict) or not isinstance(given.get("values") or {}, dict):
        raise BadRecord("a response is not an object with values", brief(given))
    facts = (person(given.get("user_id")), given.get("status"), given.get("updated_at") or given.get("inserted_at"))
    for question, value in (given.get("values") or {"": None}).items():
        yield Response(question, value.get("value") if isinstance(value, dict) else value, *facts)
