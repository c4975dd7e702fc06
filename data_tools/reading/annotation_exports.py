"""What the importers of annotation tools share: lists in options, names of people, fields found by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from data_tools.reading.fields import is_list_of, is_number
from data_tools.reading.unread import SYSTEM_FIELDS, role_of
from rlhf.data.schema import BadRecord, brief

Names = str | list[str]
"""An option that is several names: a list, or one text with commas between them."""

PROMPT_FIELDS = (
    "messages", "conversation", "chat", "prompt", "instruction", "question", "query", "input", "context", "text",
)  # fmt: skip
"""What the field of the prompt is called, where no option names it; the first that is there counts."""


def as_raw(value: Any) -> bytes:
    """A part of a row as a reject shows it, where the whole row would be too much: its JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    except RecursionError:
        return brief(value).encode()


def names(value: Names | None) -> list[str]:
    """The names in an option's value."""
    parts = value.split(",") if isinstance(value, str) else value or ()
    return [name for part in parts if (name := part.strip())]


def person(value: Any) -> str:
    """An annotator as text, from text or a number; empty where there is none.

    Raises:
        BadRecord: It is something else.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRecord("annotator: not text or a number", brief(value))
    return str(value)


def since_1970(seconds: Any, name: str) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC; None where there are none.

    Raises:
        BadRecord: It is something else.
    """
    if seconds is not None and not is_number(seconds, 0, 1e11):
        raise BadRecord(f"{name}: not seconds since 1970", brief(seconds))
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def ids_of(values: Any, name: str) -> list[str]:
    """A list of ids, as texts.

    Raises:
        BadRecord: It is something else.
    """
    if not is_list_of((str, int), values):
        raise BadRecord(f"{name}: ids are not text or numbers", brief(values))
    return list(map(str, values))


def prompt_of(fields: Mapping[str, Any], option: str | None) -> Any:
    """The value of the field that holds the prompt: the one that the option names, or of `PROMPT_FIELDS`.

    A system turn in a field of its own (`SYSTEM_FIELDS`) comes before it.

    Raises:
        BadRecord: There is no such field, or without the option several, or media that cannot be read.
    """
    found = {name.lower(): name for name in fields if fields[name] not in (None, "", [])}
    known = [found[name] for name in (PROMPT_FIELDS if option is None else (option.lower(),)) if name in found]
    if not known:
        seen = f"there are {', '.join(map(brief, list(fields)[:12]))}"
        raise BadRecord("no prompt is found", seen, "Name the field that holds it: --option prompt=FIELD")
    if option is None:
        media = [name for name in found.values() if role_of(name) == "media"]
        other = [name for name in known[1:] if not _repeats(fields[name], fields[known[0]])]
        if media or other:
            remedy = "If it is not a part of the prompt, name the field that is: --option prompt=FIELD"
            reason = f"{(media or other)[0]}: not read, and by its name it could be a part of the prompt"
            raise BadRecord(reason, brief(fields[(media or other)[0]]), remedy)
    system = [fields[found[name]] for name in SYSTEM_FIELDS if name in found and found[name] != known[0]]
    asked = fields[known[0]]
    if not system:
        return asked
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return [{"role": "system", "content": system[0]}, *turns] if isinstance(turns, list) else turns


def _repeats(value: Any, prompt: Any) -> bool:
    """Whether it is the prompt once more: the same value, or text that shows the last of its turns."""
    last = prompt[-1].get("content") if isinstance(prompt, list) and isinstance(prompt[-1], dict) else None
    return value == prompt or (isinstance(value, str) and isinstance(last, str) and last in value)


_ENDING = re.compile(r"^(.*?)[\s_.-]*([0-9]+|[a-z]|left|right)$", re.IGNORECASE)


def stem_and_ending(name: str) -> tuple[str, str]:
    """``answer`` and ``2`` of ``answer_2``; a letter and ``left`` or ``right`` end a name too. No ending: empty."""
    match = _ENDING.match(name) if len(name) <= 100 else None  # what is longer was not made to be counted
    return (match[1].lower(), match[2].lower()) if match else (name.lower(), "")


def by_stem(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Stem -> ending -> name; see `stem_and_ending`."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        stem, ending = stem_and_ending(name)
        found.setdefault(stem, {})[ending] = name
    return found


def compared(names: Iterable[str]) -> list[str]:
    """The names that differ only in their ending: the one group of three or more numbers, by the number (answer1,
    answer2, ...), else the one pair of 1 and 2, a and b, or left and right; none where there are several or none."""
    stems = by_stem(names).values()
    numbers = [{int(end): name for end, name in of.items() if end.isdecimal() and len(end) < 4} for of in stems]
    if len(long := [group for group in numbers if len(group) > 2]) == 1:
        return [long[0][number] for number in sorted(long[0])]
    ends = (("1", "2"), ("a", "b"), ("left", "right"))
    pairs = [[of[first], of[second]] for of in stems for first, second in ends if {first, second} <= of.keys()]
    return pairs[0] if len(pairs) == 1 else []
