"""The one data schema: Prompt, Demonstration, Ranking, and how datasets of them lie on disk.

A dataset is a folder of Parquet shards with a `manifest.json`; a `.jsonl` (or `.jsonl.gz`) file of the same
records is read anywhere a dataset is. Ids are content hashes, so the same prompt is the same prompt everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.errors import UserError
from rlhf.lazy import lazy

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa, pq = lazy("pyarrow"), lazy("pyarrow.parquet")

SCHEMA_VERSION = 1
ROLES = ("system", "user", "assistant")
SPLITS = ("train", "eval", "test")
ROWS_PER_SHARD = 200_000
ROWS_PER_GROUP = 5_000


class BadRecord(ValueError):
    """A row that does not fit the schema; the message says which field and why."""


def content_hash(*parts: Any) -> str:
    """16 hex digits (64 bits) of the SHA-256 of the parts' canonical JSON."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer: it ends with a user turn.

    `source` says where it came from, `group` (a topic, say) what a split may hold together, and `split` is
    train, eval, test or None while no split has been made.
    """

    messages: tuple[Message, ...]
    source: str = ""
    group: str | None = None
    split: str | None = None

    kind: ClassVar[str] = "prompt"

    @property
    def prompt_id(self) -> str:
        """Hash of the messages alone: the same prompt in every file and stage."""
        return content_hash([[m.role, m.content] for m in self.messages])

    @property
    def id(self) -> str:
        return self.prompt_id

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as `transformers` chat templates take them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]

    def with_split(self, split: str) -> Any:
        return replace(self, split=split)


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt plus the answer that a person wrote (`author` names the person, where known)."""

    answer: str = ""
    author: str = ""

    kind: ClassVar[str] = "demonstration"

    @property
    def id(self) -> str:
        return content_hash(self.prompt_id, self.answer)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer of a ranking. `author` names the model or person; `score` is an optional rating, higher = better."""

    text: str
    author: str = ""
    author_kind: Literal["model", "person", "unknown"] = "unknown"
    score: float | None = None


@dataclass(frozen=True)
class Ranking(Prompt):
    """A prompt plus K >= 2 candidates and one rank each: 1 = best, equal ranks = tie. Pairs are never stored."""

    candidates: tuple[Candidate, ...] = ()
    ranks: tuple[int, ...] = ()
    annotator: str = ""
    time: str | None = None
    """When it was made, ISO 8601."""

    kind: ClassVar[str] = "ranking"

    @property
    def id(self) -> str:
        return content_hash(self.prompt_id, [c.text for c in self.candidates], self.ranks, self.annotator, self.time)

    @property
    def informative_pairs(self) -> int:
        """Pairs of candidates with different ranks."""
        return sum(a < b for a in self.ranks for b in self.ranks)


Record = Prompt | Demonstration | Ranking
KINDS: dict[str, type[Prompt]] = {"prompt": Prompt, "demonstration": Demonstration, "ranking": Ranking}


# ---- checks and conversion ---------------------------------------------------------------------------------------


def dense_ranks(values: Iterable[float]) -> tuple[int, ...]:
    """Ranks 1, 2, ... from any numbers where smaller = better; equal numbers share a rank and none is skipped."""
    values = list(values)
    order = {value: index + 1 for index, value in enumerate(sorted(set(values)))}
    return tuple(order[value] for value in values)


def _text(value: Any, name: str, allow_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name}: expected text, got {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise BadRecord(f"{name}: empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name}: not valid Unicode (a lone surrogate)") from None
    return value


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return None if value is None else _text(value, name, allow_empty=True)


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRecord("messages: expected a non-empty list of {role, content}")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping) or item.get("role") not in ROLES:
            raise BadRecord(f"messages[{index}]: expected role ({', '.join(ROLES)}) and content, got {str(item)[:80]!r}")
        messages.append(Message(item["role"], _text(item.get("content"), f"messages[{index}].content")))
    if messages[-1].role != "user":
        raise BadRecord(f"messages: must end with a user turn, ends with {messages[-1].role}")
    if any(a.role == b.role for a, b in zip(messages, messages[1:])):
        raise BadRecord("messages: two turns in a row with the same role")
    if any(m.role == "system" for m in messages[1:]):
        raise BadRecord("messages: a system turn is allowed only first")
    return tuple(messages)


def _candidates(value: Any) -> tuple[Candidate, ...]:
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise BadRecord("candidates: expected at least two answers")
    found = []
    for index, item in enumerate(value):
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            raise BadRecord(f"candidates[{index}]: expected text or an object, got {type(item).__name__}")
        kind, score = item.get("author_kind") or "unknown", item.get("score")
        if kind not in ("model", "person", "unknown"):
            raise BadRecord(f"candidates[{index}].author_kind: {kind!r} is not model, person or unknown")
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or score != score):
            raise BadRecord(f"candidates[{index}].score: expected a number, got {score!r}")
        text = _text(item.get("text"), f"candidates[{index}].text")
        found.append(Candidate(text, _optional(item, "author") or "", kind, None if score is None else float(score)))
    return tuple(found)


def _ranks(value: Any, candidates: tuple[Candidate, ...]) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != len(candidates):
        raise BadRecord(f"ranks: expected one rank for each of the {len(candidates)} candidates, got {value!r}")
    if any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in value):
        raise BadRecord(f"ranks: expected whole numbers from 1 (best), got {list(value)!r}")
    if len({c.text for c in candidates}) < 2:
        raise BadRecord("candidates: fewer than two distinct answers")
    seen: dict[str, int] = {}
    for candidate, rank in zip(candidates, value):
        if seen.setdefault(candidate.text, rank) != rank:
            raise BadRecord("ranks: identical candidates are ranked apart")
    return dense_ranks(value)


def from_dict(row: Any, kind: str | None = None) -> Record:
    """A record from its JSON form. `messages` may also be called `prompt` and be a plain string.

    Args:
        row: A mapping with the record's fields; candidates may be plain strings.
        kind: prompt, demonstration or ranking; None decides by the fields.

    Raises:
        BadRecord: A field is missing, of the wrong type, or contradicts another.
    """
    if not isinstance(row, Mapping):
        raise BadRecord(f"expected an object, got {type(row).__name__}")
    if kind is None:
        kind = "ranking" if "candidates" in row else "demonstration" if "answer" in row else "prompt"
    cls = KINDS[kind]
    base: dict[str, Any] = {
        "messages": _messages(row.get("messages", row.get("prompt"))),
        "source": _optional(row, "source") or "",
        "group": _optional(row, "group"),
        "split": _optional(row, "split"),
    }
    if base["split"] is not None and base["split"] not in SPLITS:
        raise BadRecord(f"split: {base['split']!r} is not one of {', '.join(SPLITS)}")
    if kind == "demonstration":
        base |= {"answer": _text(row.get("answer"), "answer"), "author": _optional(row, "author") or ""}
    elif kind == "ranking":
        candidates = _candidates(row.get("candidates"))
        base |= {"candidates": candidates, "ranks": _ranks(row.get("ranks"), candidates)}
        base |= {"annotator": _optional(row, "annotator") or "", "time": _optional(row, "time")}
    record = cls(**base)
    if row.get("id") is not None and row["id"] != record.id:
        raise BadRecord(f"id: {row['id']!r} is not the content hash {record.id!r}; leave the field out")
    return record


def to_dict(record: Record) -> dict[str, Any]:
    """The record's JSON form, with its ids; `from_dict` reads it back."""
    row: dict[str, Any] = {"id": record.id, "prompt_id": record.prompt_id, "messages": record.chat}
    row |= {"source": record.source, "group": record.group, "split": record.split}
    if isinstance(record, Demonstration):
        row |= {"answer": record.answer, "author": record.author}
    elif isinstance(record, Ranking):
        keys = ("text", "author", "author_kind", "score")
        row |= {"candidates": [{k: getattr(c, k) for k in keys} for c in record.candidates]}
        row |= {"ranks": list(record.ranks), "annotator": record.annotator, "time": record.time}
    return row


def _arrow_schema(kind: str) -> pa.Schema:
    text = pa.string()
    fields = [("id", text), ("prompt_id", text)]
    fields += [("messages", pa.list_(pa.struct([("role", text), ("content", text)])))]
    fields += [("source", text), ("group", text), ("split", text)]
    if kind == "demonstration":
        fields += [("answer", text), ("author", text)]
    elif kind == "ranking":
        candidate = pa.struct([("text", text), ("author", text), ("author_kind", text), ("score", pa.float64())])
        fields += [("candidates", pa.list_(candidate)), ("ranks", pa.list_(pa.int32()))]
        fields += [("annotator", text), ("time", text)]
    return pa.schema(fields)


# ---- datasets on disk --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reject:
    """A row set aside: where it stands, why, and the raw text (cut to 10,000 characters)."""

    file: str
    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: a folder with a manifest, or a JSONL file. Records are streamed, never all in memory."""

    path: Path
    kind: str
    fingerprint: str
    """SHA-256 (64 hex digits) over the content."""
    manifest: dict[str, Any] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    """Bad rows met by the last full pass over a JSONL file."""

    def records(self, split: str | None = None) -> Iterator[Any]:
        """Stream the records, optionally of one split only. Bad JSONL rows go to `rejects`."""
        rows = self._jsonl_records() if self.path.is_file() else self._parquet_records()
        return (record for record in rows if split is None or record.split == split)

    def _parquet_records(self) -> Iterator[Record]:
        for shard in self.manifest["shards"]:
            with pq.ParquetFile(self.path / shard["file"]) as file:
                for batch in file.iter_batches(batch_size=1000):
                    for row in batch.to_pylist():
                        row.pop("id", None)  # derived from content; the shard's checksum guards it
                        yield from_dict(row, self.kind)

    def _jsonl_records(self) -> Iterator[Record]:
        self.rejects.clear()
        yield from read_jsonl(self.path, self.kind, self.rejects.append)

    def splits(self) -> dict[str | None, int]:
        """How many records each split holds."""
        if "splits" in self.manifest:
            return {None if key == "none" else key: count for key, count in self.manifest["splits"].items()}
        counts: dict[str | None, int] = {}
        for record in self.records():
            counts[record.split] = counts.get(record.split, 0) + 1
        return counts


def read_jsonl(path: Path, kind: str | None, on_reject: Callable[[Reject], None]) -> Iterator[Record]:
    """Stream records from a JSONL file (.gz allowed); a bad line is handed to `on_reject` with its number."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                yield from_dict(json.loads(raw.decode("utf-8")), kind)
            except (BadRecord, ValueError, RecursionError) as error:
                reason = str(error) if isinstance(error, BadRecord) else f"not valid JSON: {error}"
                on_reject(Reject(str(path), line, reason, raw[:10_000].decode("utf-8", "replace")))


def open_dataset(path: str | Path, kind: str | None = None, verify: bool = False) -> Dataset:
    """Open a dataset folder or a JSONL file.

    Args:
        path: Folder with `manifest.json`, or `.jsonl` / `.jsonl.gz`.
        kind: The kind that the caller needs; another is refused.
        verify: Also compare every shard with its recorded SHA-256.

    Raises:
        UserError: Nothing there, not a whole dataset, another schema version, another kind, or a damaged shard.
    """
    path = Path(path)
    if path.is_file():
        dataset = _open_jsonl(path)
    elif (path / "manifest.json").is_file():
        dataset = _open_folder(path, verify)
    elif path.is_dir():
        raise UserError(
            f"{path}: a folder without manifest.json is not a whole dataset",
            "The manifest is written last, so an import or split may have been interrupted.",
            "Run the command that writes it again, or name a .jsonl file.",
        )
    else:
        raise UserError(f"{path}: no dataset there", remedy="Check the path; make one with `rlhf data import`.")
    if kind is not None and dataset.kind != kind:
        raise UserError(
            f"{path}: holds {dataset.kind}s where {kind}s are needed",
            remedy=f"Name a dataset of {kind}s; `rlhf data stats {path}` shows what this one holds.",
        )
    return dataset


def _open_jsonl(path: Path) -> Dataset:
    first: list[str] = []
    rejects: list[Reject] = []
    for record in read_jsonl(path, None, rejects.append):
        first.append(record.kind)
        break
    if not first:
        why = f"line {rejects[0].line}: {rejects[0].reason}" if rejects else "The file is empty."
        raise UserError(f"{path}: no usable record", why, "See README, 'Your own data', for the fields.")
    return Dataset(path, first[0], _file_hash(path))


def _open_folder(path: Path, verify: bool) -> Dataset:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        version, kind, shards = manifest["schema_version"], manifest["kind"], manifest["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/manifest.json: not a dataset manifest ({error!r})") from None
    if version != SCHEMA_VERSION or kind not in KINDS:
        raise UserError(
            f"{path}: schema version {version}, kind {kind!r}; this version reads {SCHEMA_VERSION}",
            remedy="Import the data again with this version.",
        )
    for shard in shards:
        file = path / shard["file"]
        if not file.is_file() or (verify and _file_hash(file) != shard["sha256"]):
            raise UserError(
                f"{file}: {'damaged: not the bytes that were written' if file.is_file() else 'missing'}",
                remedy="Import the data again, or bring the file back from a copy.",
            )
    fingerprint = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
    return Dataset(path, kind, fingerprint, manifest)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DatasetWriter:
    """Write a dataset folder in a stream; it appears under its name only when whole.

    Used as a context manager. Records go to Parquet shards in a hidden neighbour folder, the manifest last; leaving
    the block renames it. An exception leaves nothing behind. An existing dataset of that name is replaced.

    Args:
        path: The folder to make.
        kind: prompt, demonstration or ranking.
        origin: Where the records came from (any JSON), kept in the manifest under `origin`.
    """

    def __init__(self, path: str | Path, kind: str, origin: Mapping[str, Any] | None = None) -> None:
        self.path, self.kind, self.origin = Path(path), kind, dict(origin or {})
        self.partial = self.path.parent / f".{self.path.name}.partial"
        self.count = 0
        self._splits: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._shards: list[dict[str, Any]] = []
        self._file: pq.ParquetWriter | None = None
        self._in_shard = 0

    def __enter__(self) -> DatasetWriter:
        if self.path.exists() and not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path}: exists and is not a dataset", remedy="Choose another --out.")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def write(self, record: Record) -> None:
        """Add one record of the writer's kind."""
        if record.kind != self.kind:
            raise BadRecord(f"a {record.kind} in a dataset of {self.kind}s")
        split = record.split or "none"
        self._splits[split] = self._splits.get(split, 0) + 1
        self._rows.append(to_dict(record))
        self.count += 1
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.parquet"
            self._file = pq.ParquetWriter(self.partial / name, _arrow_schema(self.kind), compression="zstd")
            self._shards.append({"file": name})
        self._file.write_table(pa.Table.from_pylist(self._rows, _arrow_schema(self.kind)))
        self._in_shard += len(self._rows)
        self._rows = []
        if self._in_shard >= ROWS_PER_SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        file = self.partial / self._shards[-1]["file"]
        sync(file)
        self._shards[-1] |= {"rows": self._in_shard, "sha256": _file_hash(file)}
        self._file, self._in_shard = None, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self._rows or not self._shards:
            self._flush()
        if self._file is not None:
            self._close_shard()
        manifest = {"schema_version": SCHEMA_VERSION, "kind": self.kind, "count": self.count}
        manifest |= {"splits": self._splits, "shards": self._shards, "origin": self.origin}
        write_json(self.partial / "manifest.json", manifest)
        shutil.rmtree(self.path, ignore_errors=True)
        os.rename(self.partial, self.path)
        sync(self.path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename after it cannot outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, flush it, rename it: never a half file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    sync(partial)
    os.replace(partial, path)
