"""The one data schema that runs through all stages: Prompt, Demonstration, Ranking.

Ids are content hashes, so the same prompt is the same prompt in every file and stage. `rlhf.store` keeps datasets of
these records on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

SCHEMA_VERSION = 1
ROLES = ("system", "user", "assistant")
SPLITS = ("train", "eval", "test")


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
            raise BadRecord(
                f"messages[{index}]: expected role ({', '.join(ROLES)}) and content, got {str(item)[:80]!r}"
            )
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
        kind: Any = item.get("author_kind") or "unknown"
        score = item.get("score")
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
