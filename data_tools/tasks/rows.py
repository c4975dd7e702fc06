"""Rows of labelled tasks: which column is which field, and which answer a label means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.io.expressions import Expression, Failed
from data_tools.tasks.families import ALWAYS, Family
from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import SPLITS, BadRecord, content_hash

SPLIT_NAMES = {"training": "train", "dev": "eval", "val": "eval", "valid": "eval", "validation": "eval"}
MOST_LETTERS = 26
_EXPRESSION = re.compile(r"\{\{(.*)\}\}", re.DOTALL)


@dataclass(frozen=True)
class TemplateRow:
    """One row as templates see it, checked."""

    fields: Mapping[str, str]
    """The family's fields that the row has, without the answer."""
    answer: str
    """The right answer; one of `choices` where there are any."""
    choices: tuple[str, ...]
    rationale: str
    """Empty where the row has none."""
    task: str
    split: str | None
    author: str

    @property
    def key(self) -> str:
        """Hash of the content: rows that say the same have the same."""
        return content_hash(self.task, sorted(self.fields.items()), self.choices, self.answer, self.rationale)


class Mapper:
    """Turns rows into examples.

    Args:
        family: Says which fields there are.
        words: ``FIELD=COLUMN`` or ``FIELD={{ expression over columns }}``; a field without a word is the column of
            the same name. In an expression `row` is the whole row, for columns whose names are no names.
        choices: The choices of every row that has none itself; the family's by default.
        task: The name of the task where rows have none.

    Raises:
        UserError: A word of another form, an unknown field, or an expression that is none.
    """

    def __init__(self, family: Family, words: Sequence[str], choices: Sequence[str] | None, task: str) -> None:
        self._family, self._task = family, task
        self._choices = family.choices if choices is None else _checked_choices(choices)
        self._sources: dict[str, str | Expression] = {name: name for name in family.known}
        for word in words:
            name, equals, source = (part.strip() for part in word.partition("="))
            if not equals or not source:
                raise UserError(f"--field {word!r}: is not FIELD=COLUMN", remedy="Such as --field text=Review")
            if name not in family.known:
                remedy = nearest(name, family.known)
                raise UserError(f"--field {word!r}: {family.name} has no field {name!r}", remedy=remedy)
            found = _EXPRESSION.fullmatch(source)
            self._sources[name] = Expression(found[1].strip(), f"--field {name}") if found else source

    def __call__(self, row: Any) -> TemplateRow:
        """The example of a row.

        Raises:
            BadRecord: A field is missing, or the answer is not one of the choices.
        """
        if not isinstance(row, Mapping):
            raise BadRecord("not an object", type(row).__name__)
        family = self._family
        values = {name: self._value(row, name) for name in (*family.fields, *family.optional)}
        label = values.pop(family.answer)
        fields = {name: _text(value, name) for name, value in values.items()}
        for name in family.fields:
            if label in (None, "") if name == family.answer else not fields[name]:
                raise BadRecord(f"{name}: missing or empty", self._told(row, name), _MAP)
        choices = self._value(row, "choices")
        choices = self._choices if choices in (None, "", []) else _checked_choices(choices)
        answer = self._answer(label, choices)
        universal = {name: _text(self._value(row, name), name) for name in ALWAYS if name != "choices"}
        return TemplateRow(
            {name: text for name, text in fields.items() if text}, answer, choices, universal["rationale"],
            universal["task"] or self._task, parse_split(universal["split"]), universal["author"],
        )  # fmt: skip

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        source = self._sources[name]
        if isinstance(source, str):
            return row.get(source)
        try:
            return source({**row, "row": row})
        except Failed as error:
            raise BadRecord(f"{name}: cannot be computed", str(error), "Correct the expression or the row.") from None

    def _told(self, row: Mapping[str, Any], name: str) -> str:
        source = self._sources[name]
        if isinstance(source, Expression):
            return f"computed by {source.source!r}"
        if source in row:
            return f"in column {source!r}"
        columns = ", ".join(map(repr, list(row)[:20]))
        return f"no column {source!r} among {columns}"

    def _answer(self, label: Any, choices: tuple[str, ...]) -> str:
        """The choice that a label means: by its text, else by its number from 0. Without choices, its text."""
        text = _text(int(label) if isinstance(label, bool) and choices else label, self._family.answer)
        if not text:
            raise BadRecord(f"{self._family.answer}: missing or empty", remedy=_MAP)
        if not choices or text.strip() in choices:
            return text.strip() if choices else text
        if text.strip().isdecimal() and len(text) < 4 and int(text) < len(choices):
            return choices[int(text)]
        detail = f"{text[:100]!r}; the choices are {', '.join(map(repr, choices[:20]))}"
        raise BadRecord(f"{self._family.answer}: not one of the choices", detail, "Give the right --choices, in order.")


_MAP = "Name its column by --field, or leave the row out."


def _text(value: Any, name: str) -> str:
    """Text of a value: numbers are written out, and nothing is an empty text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRecord(f"{name}: not text", type(value).__name__, "Compute a text by --field 'NAME={{ ... }}'.")
    text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord(f"{name}: not valid Unicode (a lone surrogate)") from None
    return "" if text.isspace() else text


def _checked_choices(values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise BadRecord("choices: not a list", type(values).__name__, "--field 'choices={{ COLUMN.split(\"|\") }}'")
    choices = tuple(_text(value, "choices").strip() for value in values)
    if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
        raise BadRecord("choices: not two or more different texts", ", ".join(map(repr, choices[:20])))
    return choices


def parse_split(text: str) -> str | None:
    """train, eval or test of a word for a split (dev, validation, ...); None for an empty one.

    Raises:
        BadRecord: It is another word.
    """
    name = text.strip().lower()
    name = SPLIT_NAMES.get(name, name)
    if name and name not in SPLITS:
        raise BadRecord(f"split: not one of {', '.join(SPLITS)}", repr(text[:100]))
    return name or None


def parse_choices(text: str) -> list[str]:
    """``negative,neutral,positive`` as a list.

    Raises:
        UserError: Fewer than two different ones.
    """
    try:
        return list(_checked_choices(text.split(",")))
    except BadRecord as fault:
        raise UserError(f"--choices {text!r}: {fault.reason}", remedy="Write, for instance, --choices no,yes") from None
