"""Fields of a row that could matter and that an importer does not read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from data_tools.reading.annotation_exports import brief
from data_tools.reading.roles import role_of, says_something
from rlhf.data.schema import BadRecord

HOLDS = {
    "prompt": "a prompt", "system turn": "a system turn", "answer": "an answer", "judgement": "a judgement",
    "media": "media",
}  # fmt: skip
"""Role -> how a message says it."""


class ReadFields(dict[str, Any]):
    """A row that remembers which of its fields were read: asked for by name, or all by `items` or `values`."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()


def unread_fault(row: Any, ignored: Collection[str] = ()) -> BadRecord | None:
    """The fault of a row with a field that was not read and could be a prompt, a system turn, an answer, a judgement
    or media; None where there is none.

    A text or list that repeats one that was read is no loss.

    Args:
        row: A `ReadFields` after its record was made; of anything else nothing is known.
        ignored: Fields that need not be read.
    """
    if not isinstance(row, ReadFields):
        return None
    unread = [name for name in row if name not in row.read and name not in ignored]
    found = [(name, role) for name in unread if (role := role_of(name))]
    if not found:
        return None
    known = [_plain(dict.__getitem__(row, name)) for name in row.read if name in row]
    lost = {}
    for name, role in found:
        value = dict.__getitem__(row, name)
        repeats = role not in ("judgement", "media") and _plain(value) in known
        if says_something(value, role) and not repeats:
            lost[name] = role
    if not lost:
        return None
    name, role = next(iter(lost.items()))
    words = " ".join(f"--ignore {each}" for each in lost)
    remedy = f"If it does not matter, leave it out: {words}. Else import by the mapping `csv`."
    value = brief(dict.__getitem__(row, name))
    return BadRecord(f"{name}: not read, and by its name it could hold {HOLDS[role]}", value, remedy)


def _plain(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value
