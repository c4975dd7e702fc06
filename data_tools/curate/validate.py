"""Validate: one full pass over a dataset, every fault listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.io.rejects import by_count
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.jsonl import OnReject, Reject, read_jsonl
from rlhf.data.schema import Record
from rlhf.data.store import Dataset, open_dataset, read_shard, shard_faults


def validate(path: str | Path, on_fault: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Check every row of a dataset, the bytes of every shard, the stored ids, and the manifest's counts.

    Args:
        path: A dataset folder or a JSONL file.
        on_fault: Called with each fault as it is found.

    Returns:
        path, kind, ok, read, good, bad, reasons (bad rows by reason), bad_rows (file, line, reason, detail), and
        faults (of the files and the manifest, as text).

    Raises:
        UserError: There is no dataset to check, or it has another schema version.
    """
    path = Path(path)
    bad_rows: list[dict[str, Any]] = []
    faults: list[str] = []

    def reject(row: Reject) -> None:
        bad_rows.append({"file": row.file, "line": row.line, "reason": row.reason, "detail": row.detail})
        on_fault(str(row))

    def fault(text: str) -> None:
        faults.append(text)
        on_fault(text)

    dataset = None if path.is_file() else open_dataset(path, damaged_ok=True)
    if dataset:
        records = _shard_records(dataset, reject, fault)
    else:
        records = _until_damaged(read_jsonl(path, None, reject), fault)
    kind = dataset.kind if dataset else None
    good, splits = 0, Counter[str]()
    for record in records:
        kind = kind or record.kind
        good += 1
        splits[record.split or "none"] += 1
    if dataset:
        _check_counts(dataset, good, splits, fault)
    elif not good and not bad_rows and not faults:
        fault(f"{path}: no row")
    reasons = by_count(Counter(row["reason"] for row in bad_rows))
    return {
        "path": str(path), "kind": kind, "ok": not bad_rows and not faults, "read": good + len(bad_rows),
        "good": good, "bad": len(bad_rows), "reasons": reasons, "bad_rows": bad_rows, "faults": faults,
    }  # fmt: skip


def _shard_records(dataset: Dataset, reject: OnReject, fault: Callable[[str], None]) -> Iterator[Record]:
    wrong = dict(shard_faults(dataset))
    for shard in dataset.manifest["shards"]:
        name = shard["file"]
        if name in wrong:
            fault(f"{dataset.path / name}: {wrong[name]}")
        if wrong.get(name) == "missing":
            continue
        yield from _until_damaged(read_shard(dataset.path / name, dataset.kind, reject, check_ids=True), fault)


def _until_damaged(records: Iterator[Record], fault: Callable[[str], None]) -> Iterator[Record]:
    try:
        yield from records
    except UserError as error:
        fault(error.what)


def _check_counts(dataset: Dataset, good: int, splits: Counter[str], fault: Callable[[str], None]) -> None:
    stated = dataset.manifest.get("count")
    if stated != good:
        fault(f"{dataset.path}/manifest.json: count is {stated}, the shards hold {good} good records")
    if dataset.manifest.get("splits") != splits:
        fault(f"{dataset.path}/manifest.json: splits are {dataset.manifest.get('splits')}, counted {dict(splits)}")


def show(summary: dict[str, Any]) -> None:
    """Print the sum of what `validate` returns; the faults themselves are printed as they are found."""
    if summary["reasons"]:
        console.table("bad rows", ["reason", "rows"], summary["reasons"].items())
    verdict = "good" if summary["ok"] else "BAD"
    counted = f"{summary['read']:,} rows: {summary['good']:,} good, {summary['bad']:,} bad"
    more = f", {len(summary['faults'])} faults in its files" if summary["faults"] else ""
    console.say(f"{summary['path']}: {verdict}: {counted}{more}")
