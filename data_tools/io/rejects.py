"""Rejected rows: counted by reason, written to a file of the dataset, and reported to the user."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.jsonl import Reject

FILE_NAME = "rejected.jsonl"


class Rejects:
    """Collects rejected rows; a context manager that holds the file open.

    Args:
        path: JSONL file with one object a row: file, line, reason, detail, remedy, raw. It is created with the first
            row, so a dataset without rejected rows has none.
        strict: Raise a `UserError` at the first row instead.
        ignored_fields: Fields of rows that importers may leave unread, because the user says so.
    """

    def __init__(self, path: Path, strict: bool = False, ignored_fields: Collection[str] = ()) -> None:
        self.path, self.strict, self.ignored_fields = path, strict, ignored_fields
        self.count = 0
        self.reasons: dict[str, int] = {}
        self.first: dict[str, Reject] = {}
        """The first row of each reason."""
        self._file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, reject: Reject) -> None:
        if self.strict:
            raise UserError(str(reject), "--strict stops at the first row that cannot be used.", reject.remedy)
        self.count += 1
        self.reasons[reject.reason] = self.reasons.get(reject.reason, 0) + 1
        self.first.setdefault(reject.reason, reject)
        if self._file is None:
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  # __exit__ closes it
        row = asdict(reject)
        row["raw"] = row.pop("raw")  # long, so last
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def in_words(self) -> str:
        """The reasons with their numbers of rows, in a line."""
        return ", ".join(f"{reason} ({rows:,})" for reason, rows in self.reasons.items())


def by_count(reasons: dict[str, int]) -> dict[str, int]:
    """The reasons, most frequent first, then by name."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def warn_rejected(summary: Mapping[str, Any]) -> None:
    """Warn if a command skipped bad rows: its summary has `rejected`, their number, and `out`, the new dataset."""
    if summary["rejected"]:
        console.warn(f"{summary['rejected']:,} bad rows were rejected; see {Path(summary['out']) / FILE_NAME}")


def print_reasons(reasons: dict[str, int], first: dict[str, Reject]) -> None:
    """Print the reasons with the place of the first row of each."""
    if not reasons:
        return
    rows: list[list[Any]] = []
    for reason, count in by_count(reasons).items():
        row = first[reason]
        rows.append([reason, count, f"{Path(row.file).name}:{row.line}", row.detail, row.remedy])
    console.table("rejected rows", ["reason", "rows", "first at", "detail", "what to do"], rows)
