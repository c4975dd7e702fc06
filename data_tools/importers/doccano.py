"""The importer of doccano's sequence-to-sequence projects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.reading.rows import IMPORTERS, JSON, Head, convert_rows
from data_tools.reading.tools import brief
from rlhf.data.schema import BadRecord, Demonstration, Message, Record
from rlhf.data.store import OnReject


def _detect(head: Head) -> str | None:
    if not head.all_have("text", "label") or not all(isinstance(row["label"], list) for row in head.rows):
        return None
    labels = [label for row in head.rows for label in row["label"]]
    long = [label for label in labels if isinstance(label, str) and len(label.split()) > 3]
    return "its rows have a `text`, and `label` lists whole sentences" if 2 * len(long) > len(labels) else None


@IMPORTERS.row(
    "doccano",
    suffixes=JSON,
    sample=json.dumps({"id": 1, "text": "Name a fruit.", "label": ["A pear is a fruit."]}) + "\n",
    detect=_detect,
)
def doccano(path: Path, reject: OnReject) -> Iterator[Record]:
    """doccano: sequence-to-sequence exports (JSON or JSONL), {text, label: [answers]}, as demonstrations.

    doccano has no ranks: each answer of `label` becomes a demonstration of its own. A text without an answer is one
    reject. Exports of classification projects look the same, with labels in place of answers: `auto` takes only files
    whose answers are mostly of four words or more. A CSV export is read by
    `csv --option prompt=text --option answer=label`.
    """
    return convert_rows(path, reject, _demonstrations)


def _demonstrations(row: Any) -> Iterator[Record | BadRecord]:
    if not isinstance(row, dict) or not isinstance(row.get("label", []), list):
        raise BadRecord("not an object with a text and a list of answers", brief(row))
    if not row.get("label"):
        raise BadRecord("the text has no answer", remedy="Nothing is wrong: nobody has written one yet.")
    for answer in row["label"]:
        try:
            yield Demonstration((Message("user", row.get("text")),), source="doccano", answer=answer)  # type: ignore[arg-type]
        except BadRecord as fault:
            yield fault
