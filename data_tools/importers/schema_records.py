"""The importer of the schema's own records."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.published.table import FileHead, convert_rows, file_format
from rlhf.core.console import warn
from rlhf.data.jsonl import OnReject, from_dict
from rlhf.data.schema import Record, brief

PROMPT_FIELDS = {"id", "prompt_id", "messages", "prompt", "source", "group", "split"}
FIELDS = PROMPT_FIELDS | {
    "answer", "author", "candidates", "ranks", "annotator", "time", "seconds", "shown", "weight", "merged",
}  # fmt: skip


def _detect(head: FileHead) -> str | None:
    if not head.rows or not all(isinstance(row, dict) and {"messages", "prompt"} & row.keys() for row in head.rows):
        return None
    if head.all_have("candidates"):
        return "its rows have a prompt and `candidates`"
    if head.all_have("answer"):
        return "its rows have a prompt and an `answer`"
    return "its rows have a prompt alone" if all(map(_is_prompt, head.rows)) else None


def _is_prompt(row: dict[str, Any]) -> bool:
    messages = row.get("messages", row.get("prompt"))
    last = messages[-1] if isinstance(messages, list) and messages else None
    asks = isinstance(messages, str) or (isinstance(last, dict) and last.get("role") == "user")
    return asks and row.keys() <= PROMPT_FIELDS


@file_format("jsonl", detect=_detect)
def jsonl(path: Path, reject: OnReject) -> Iterator[Record]:
    """The schema's own records, one JSON object a line.

    Ranks: 1 is the best, equal ranks are a tie. Rankings have `candidates` and `ranks`, proposals `candidates` alone,
    demonstrations `answer`, prompts none of them. Candidates are in the order shown where the row says so (`shown`).
    In place of `ranks`, each candidate may have its `rank`; a prompt or a candidate may be plain text. The first usable
    row decides the kind of the file; a row of another is rejected.
    """
    kind: str | None = None
    seen = set(FIELDS)

    def convert(row: object) -> Record:
        nonlocal kind
        if isinstance(row, dict) and not row.keys() <= seen:
            _warn_of_typos(path, row, seen)
            seen.update(row)
        record = from_dict(row, kind)
        kind = record.kind
        return record

    return convert_rows(path, reject, convert)


def _warn_of_typos(path: Path, row: dict[str, Any], seen: set[str]) -> None:
    """Warn of new fields that are not read and are called nearly like one that the row lacks."""
    for name in sorted(row.keys() - seen):
        for match in difflib.get_close_matches(name, FIELDS - row.keys() - {"id"}, n=1, cutoff=0.75):
            warn(f"{path}: the field {brief(name)} is not read; did you mean '{match}'?")
