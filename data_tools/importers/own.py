"""The importer of the schema's own records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.importers.rows import IMPORTERS, JSON, convert_rows
from rlhf.schema import Record, from_dict
from rlhf.store import OnReject


@IMPORTERS.row("jsonl", suffixes=JSON)
def jsonl(path: Path, reject: OnReject) -> Iterator[Record]:
    """The schema's own records, one JSON object a line.

    Rankings have `candidates` and `ranks` (1 = best, equal = tie), proposals `candidates` alone, demonstrations
    `answer`, prompts none of them. The first usable row decides the kind of the file; a row of another is rejected.
    """
    kind: str | None = None

    def convert(row: object) -> Record:
        nonlocal kind
        record = from_dict(row, kind)
        kind = record.kind
        return record

    return convert_rows(path, reject, convert)
