"""Datasets on disk: a folder of Parquet shards with a `manifest.json`, or a `.jsonl` (`.jsonl.gz`) file.

Both are streamed, so a dataset may be larger than memory. `rlhf.data.writer` writes a folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from rlhf.core.errors import UserError
from rlhf.core.files import short_names
from rlhf.core.lazy import pa, pq
from rlhf.data.jsonl import RAW_KEPT, OnReject, Reject, from_dict, read_jsonl
from rlhf.data.manifest import RESTORE, file_hash, known_kind, read_manifest, shard_fault
from rlhf.data.schema import BadRecord, Record


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: a folder with a manifest, or a JSONL file. Records are streamed."""

    path: Path
    kind: str
    fingerprint: str
    """SHA-256 (64 hex digits) of the content."""
    manifest: dict[str, Any] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    """Bad rows in the last full pass over a JSONL file; their raw text is cut to 10,000 characters."""
    _intact: set[str] = field(default_factory=set, repr=False, compare=False)
    """Shards whose content has been compared with the manifest."""

    def records(self, split: str | None = None, on_reject: OnReject | None = None) -> Iterator[Any]:
        """Stream the records, of one split or of all.

        Bad rows of a JSONL file go to `on_reject`; without it, they are kept in `rejects`.

        Raises:
            UserError: A shard or a compressed file is damaged.
        """
        rows = self._jsonl_records(on_reject) if self.path.is_file() else self._parquet_records()
        return (record for record in rows if split is None or record.split == split)

    def _parquet_records(self) -> Iterator[Record]:
        for shard in self.manifest["shards"]:
            self.verify(shard)
            yield from read_shard(self.path / shard["file"], self.kind, _refuse_shard)

    def verify(self, shard: Mapping[str, Any]) -> None:
        """Compare a shard of the manifest with its SHA-256, once. Takes a fortieth of the time of reading its records.

        Without it, a flipped bit often gives another text and no error.

        Raises:
            UserError: The shard is missing or damaged.
        """
        if shard["file"] in self._intact:
            return
        if fault := shard_fault(self.path / shard["file"], shard["sha256"]):
            raise UserError(f"{self.path / shard['file']}: {fault}", remedy=RESTORE)
        self._intact.add(shard["file"])

    def _jsonl_records(self, on_reject: OnReject | None) -> Iterator[Record]:
        if on_reject is None:
            self.rejects.clear()
        yield from read_jsonl(self.path, self.kind, on_reject or self._keep)

    def _keep(self, reject: Reject) -> None:
        self.rejects.append(replace(reject, raw=reject.raw[:RAW_KEPT]))

    def splits(self) -> dict[str | None, int]:
        """Number of records in each split; the key None is for records without a split."""
        if "splits" in self.manifest:
            return {None if key == "none" else key: count for key, count in self.manifest["splits"].items()}
        return dict(Counter(record.split for record in self.records()))


def _refuse_shard(reject: Reject) -> NoReturn:
    raise UserError(
        str(reject),
        "A record in a shard does not fit the schema, although records are checked before they are written.",
        "Import the data again. `rlhf data validate` lists all faults.",
    )


def read_shard(path: Path, kind: str, on_reject: OnReject, check_ids: bool = False) -> Iterator[Record]:
    """Stream the records of one Parquet shard. Rows that do not fit the schema go to `on_reject`.

    Args:
        check_ids: Also compare the stored ids with the content. Training does not need this, because ids are derived
            from the content and the shard has a checksum.

    Raises:
        UserError: The file is not readable Parquet.
    """
    line = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    line += 1
                    if not check_ids:
                        row["id"] = row["prompt_id"] = None
                    try:
                        record = from_dict(row, kind)
                    except BadRecord as fault:
                        on_reject(Reject.of(path, line, fault, json.dumps(row, ensure_ascii=False, default=str)))
                    else:
                        record.read_from(path, line)
                        yield record
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged after row {line}: {error}", remedy=RESTORE) from None


def open_dataset(path: str | Path, kind: str | None = None, verify: bool = False, damaged_ok: bool = False) -> Dataset:
    """Open a dataset folder or a JSONL file.

    Args:
        path: Folder with `manifest.json`, or a `.jsonl` / `.jsonl.gz` file.
        kind: The kind that the caller needs.
        verify: Also compare every shard with its recorded SHA-256.
        damaged_ok: Open the dataset even if shards are missing or damaged; see `shard_faults`.

    Raises:
        UserError: There is no complete dataset, its schema version or kind is wrong, or a shard is damaged.
    """
    path = Path(path)
    if path.is_file():
        dataset = _open_jsonl(path)
    elif (path / "manifest.json").is_file():
        dataset = Dataset(path, *read_manifest(path))
        for file, fault in [] if damaged_ok else shard_faults(dataset, verify):
            raise UserError(f"{path / file}: {fault}", remedy=RESTORE)
    else:
        raise _no_dataset(path)
    if kind is not None and dataset.kind != known_kind(kind):
        raise UserError(
            f"{path}: contains {dataset.kind}s, but {kind}s are needed",
            remedy=f"Name a dataset of {kind}s; `rlhf data stats {quote(str(path))}` shows what this one contains.",
        )
    return dataset


def _no_dataset(path: Path) -> UserError:
    """The error for a path that is no dataset, with those in it or next to it, which may be meant."""
    if not path.is_dir():
        near = short_names(_below(next(above for above in path.absolute().parents if above.is_dir())))
        remedy = f". Datasets nearby: {near}" if near else ", or make one with `rlhf data import`."
        return UserError(f"{path}: there is no dataset", remedy="Check the path" + remedy)
    what = f"{path}: not a complete dataset, because it has no manifest.json"
    if any(path.glob("*.parquet")):
        why = "The manifest is written last, so an import or split may have been interrupted."
        return UserError(what, why, "Run the command that writes it again, or name a .jsonl file.")
    if inside := short_names(_below(path)):
        return UserError(what, remedy=f"Name a dataset in it: {inside}")
    return UserError(what, remedy="Name a folder that a command has written as a dataset, or a .jsonl file.")


def _below(folder: Path) -> list[Path]:
    """The datasets in a folder; if there are none, those in its folders."""
    found = sorted(folder.glob("*/manifest.json")) or sorted(folder.glob("*/*/manifest.json"))
    return [one.parent for one in found]


def _open_jsonl(path: Path) -> Dataset:
    bad: list[Reject] = []
    first = next(read_jsonl(path, None, lambda reject: None if bad else bad.append(reject)), None)
    if first is None:
        why = f"First fault: {bad[0]}" if bad else "The file is empty."
        raise UserError(f"{path}: no valid record", why, "See README, 'Your own data', for the fields.")
    return Dataset(path, first.kind, file_hash(path))


def shard_faults(dataset: Dataset, verify: bool = True) -> Iterator[tuple[str, str]]:
    """(file name, fault) of every shard that is missing or, with `verify`, has the wrong SHA-256."""
    for shard in dataset.manifest.get("shards", []):
        if fault := shard_fault(dataset.path / shard["file"], shard["sha256"] if verify else None):
            yield shard["file"], fault
