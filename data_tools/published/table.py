"""The table of row converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from rlhf.core.table import Table

PUBLISHED = Table("format")


class Beginning(Protocol):
    """What `detect` sees of a file: its path, the text that it begins with, the values of its first rows."""

    @property
    def path(self) -> Path: ...

    @property
    def text(self) -> str: ...

    @property
    def rows(self) -> list[Any]: ...

    def all_have(self, *fields: str) -> bool:
        """Whether there are rows, and each is an object with these fields."""


def are_lists_of_text(head: Beginning, *fields: str) -> bool:
    """Whether these fields of each row are lists of text with something in them."""
    return head.all_have(*fields) and all(
        isinstance(row[name], list) and row[name] and all(isinstance(item, str) for item in row[name])
        for row in head.rows
        for name in fields
    )
