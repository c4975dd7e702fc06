"""The data schema of all stages: Prompt, Demonstration, Proposal, Ranking.

Ids are content hashes, so a prompt has the same id in every file and stage. `rlhf.data.store` reads and writes datasets
of these records.
"""

from __future__ import annotations

import hashlib
import reprlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import orjson

from rlhf.data.tool_turns import DEFINITIONS, RESULT, TOOL_ROLES, tool_fault

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has no proposals, and no `seconds`, `shown`, `weight` and `merged` in rankings (defaults apply)."""
ROLES = ("system", "user", "assistant", *TOOL_ROLES)
SPLITS = ("train", "eval", "test")
MODEL_AUTHOR = "model:"
"""How the author of a demonstration begins that a model wrote."""
AUTHOR_KINDS = ("model", "person", "unknown")


class BadRecord(ValueError):
    """Data that does not fit the schema. The message is the reason, with the detail in brackets.

    Args:
        reason: Which field and what is wrong, in the same words for every such row, so that rows can be counted by it.
        detail: The value or the position in this row.
        remedy: What to do.
    """

    def __init__(self, reason: str, detail: str = "", remedy: str = "Correct the field, or remove the row.") -> None:
        self.reason, self.detail, self.remedy = reason, detail, remedy
        super().__init__(f"{reason} ({detail})" if detail else reason)


def content_hash(*parts: Any) -> str:
    """16 hex digits (64 bits) of the SHA-256 of the parts' canonical JSON: UTF-8, no spaces, keys sorted."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


# ---- records: checked when created, so every existing record is valid ------------------------------------------------


class Message(NamedTuple):  # quicker to construct than a frozen dataclass; an import makes several per record
    """One turn of a chat. `rlhf.data.tool_turns` says what the turns of tools hold."""

    role: Literal["system", "user", "assistant", "tools", "tool_calls", "tool"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user turn, or with what a tool returned.

    `source` says where it came from. `group`, such as a topic, can be held out as a whole. `split` is train, eval,
    test, or None before splits are made.

    Raises:
        BadRecord: A field has the wrong type, is empty, or contradicts another.
    """

    messages: tuple[Message, ...]
    source: str = ""
    group: str | None = None
    split: str | None = None
    _prompt_id: str = field(default="", init=False, repr=False, compare=False)
    _place: tuple[Any, int] | None = field(default=None, init=False, repr=False, compare=False)

    kind: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        _check_text(self.source, "source", empty_ok=True)
        _check_text(self.group, "group", none_ok=True)
        if self.split is not None and self.split not in SPLITS:
            raise BadRecord(f"split: not one of {', '.join(SPLITS)}", f"got {brief(self.split)}")

    @property
    def prompt_id(self) -> str:
        """Hash of the messages only, so it is the same in every file and stage."""
        if not self._prompt_id:
            object.__setattr__(self, "_prompt_id", content_hash(list(map(list, self.messages))))
        return self._prompt_id

    @property
    def id(self) -> str:
        """Hash of the record without `source`, `group` and `split`."""
        return self.prompt_id

    @property
    def read_at(self) -> tuple[Any, int] | None:
        """The file and line (in Parquet: the row) that the record was read from; None if it was not."""
        return self._place

    @property
    def place(self) -> str:
        """`read_at` as FILE:LINE; empty if there is none."""
        return "" if self._place is None else f"{self._place[0]}:{self._place[1]}"

    def read_from(self, file: Any, line: int) -> None:
        """Note where the record was read. A changed copy has no place."""
        object.__setattr__(self, "_place", (file, line))

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as {role, content}. Without turns of tools, chat templates of `transformers` take them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]

    @property
    def prompt_fields(self) -> tuple[tuple[Message, ...], str, str | None, str | None]:
        """What every kind of record begins with: messages, source, group and split."""
        return self.messages, self.source, self.group, self.split

    @property
    def answers(self) -> list[str]:
        """The texts of its answers or candidates."""
        return []

    def with_split(self, split: str) -> Any:
        return replace(self, split=split)


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt plus the answer that a person wrote, or a teacher. `author` names the person, if known, or the teacher
    as `model:NAME`."""

    answer: str = ""
    author: str = ""

    kind: ClassVar[str] = "demonstration"

    def __post_init__(self) -> None:
        Prompt.__post_init__(self)
        _check_text(self.answer, "answer")
        _check_text(self.author, "author", empty_ok=True)

    @property
    def answers(self) -> list[str]:
        return [self.answer]

    @property
    def id(self) -> str:
        return content_hash(self.prompt_id, self.answer)


class Candidate(NamedTuple):
    """One answer of a ranking. `author` names the model or person; `score` is an optional rating, higher is better."""

    text: str
    author: str = ""
    author_kind: Literal["model", "person", "unknown"] = "unknown"
    score: float | None = None


@dataclass(frozen=True)
class Proposal(Prompt):
    """A prompt plus K >= 2 candidates that are not ranked yet, in the order in which to show them."""

    candidates: tuple[Candidate, ...] = ()

    kind: ClassVar[str] = "proposal"

    def __post_init__(self) -> None:
        Prompt.__post_init__(self)
        _check_candidates(self.candidates)

    @property
    def answers(self) -> list[str]:
        return [candidate.text for candidate in self.candidates]

    @property
    def id(self) -> str:
        return content_hash(self.prompt_id, self.answers)


@dataclass(frozen=True)
class Ranking(Proposal):
    """A prompt plus K >= 2 candidates with one rank each: 1 = best, equal ranks = tie. Pairs are never stored.

    Ranks are stored dense: 1, 3, 3 becomes 1, 2, 2.
    """

    ranks: tuple[int, ...] = ()
    annotator: str = ""
    time: str | None = None
    """When the annotator made the ranking, ISO 8601."""
    seconds: float | None = None
    """How long the annotator took."""
    shown: bool = False
    """True if the candidates are in the order in which the annotator saw them, first = top or left."""
    weight: float = 1.0
    """Weight of its loss in training. In an aggregated ranking, its confidence."""
    merged: tuple[str, ...] = ()
    """Ids of the rankings that this one was aggregated from; empty if a person made it."""

    kind: ClassVar[str] = "ranking"

    def __post_init__(self) -> None:
        Proposal.__post_init__(self)
        _check_ranks(self.ranks, self.candidates)
        object.__setattr__(self, "ranks", dense_ranks(self.ranks))
        _check_text(self.annotator, "annotator", empty_ok=True)
        _check_time(self.time)
        if self.seconds is not None and not (_is_finite(self.seconds) and self.seconds >= 0):
            raise BadRecord("seconds: not a number from 0", brief(self.seconds))
        if type(self.shown) is not bool:
            raise BadRecord("shown: not true or false", brief(self.shown))
        if self.weight != 1 and not (_is_finite(self.weight) and self.weight > 0):
            raise BadRecord("weight: not a number above 0", brief(self.weight))
        if not isinstance(self.merged, tuple) or (self.merged and {type(part) for part in self.merged} != {str}):
            raise BadRecord("merged: not a list of ids", brief(self.merged))

    @property
    def id(self) -> str:
        return content_hash(self.prompt_id, self.answers, self.ranks, self.annotator, self.time)

    @property
    def informative_pairs(self) -> int:
        """Pairs of candidates with different ranks."""
        return sum(a < b for a in self.ranks for b in self.ranks)


Record = Prompt | Demonstration | Proposal | Ranking
KINDS: dict[str, type[Prompt]] = {kind.kind: kind for kind in (Prompt, Demonstration, Proposal, Ranking)}


@cache
def field_names(kind: str) -> tuple[str, ...]:
    """The ids and fields of a kind of record, in the order of its columns on disk."""
    return ("id", "prompt_id", *(field.name for field in fields(KINDS[kind]) if not field.name.startswith("_")))


def dense_ranks(values: Iterable[float]) -> tuple[int, ...]:
    """Ranks 1, 2, ... of numbers, smaller = better. Equal numbers get equal ranks, and no rank is skipped."""
    return _dense_ranks(tuple(values))


@lru_cache(4096)
def _dense_ranks(values: tuple[float, ...]) -> tuple[int, ...]:
    order = {value: rank for rank, value in enumerate(sorted(set(values)), 1)}
    return tuple(order[value] for value in values)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_text(value: Any, name: str, index: int | None = None, empty_ok: bool = False, none_ok: bool = False) -> None:
    if type(value) is str and value.isascii() and (empty_ok or (value and not value.isspace())):
        return  # fast path for the usual case
    if none_ok and value is None:
        return
    where = "" if index is None else f"at index {index}"
    if not isinstance(value, str):
        raise BadRecord(f"{name}: not text", f"{where + ': ' if where else ''}{type(value).__name__}")
    if not empty_ok and (not value or value.isspace()):
        raise BadRecord(f"{name}: empty", where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name}: not valid Unicode (a lone surrogate)", where) from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, tuple) or not messages:
        raise BadRecord("messages: none", brief(messages))
    before = None
    for index, message in enumerate(messages):
        if not isinstance(message, Message):
            raise BadRecord("messages: not a list of {role, content}", f"at index {index}: {brief(message)}")
        if message.role not in ROLES:
            raise BadRecord(f"messages.role: not one of {', '.join(ROLES)}", f"at index {index}: {brief(message.role)}")
        _check_text(message.content, "messages.content", index)
        if message.role in TOOL_ROLES and (fault := tool_fault(*message, before)):
            raise BadRecord(fault[0], f"at index {index}: {fault[1]}")
        if message.role == before and before != RESULT:
            raise BadRecord("messages: two turns in a row with the same role", f"at index {index}: {before}")
        if message.role == "system" and index and before != DEFINITIONS:
            raise BadRecord("messages: a system turn is allowed only first", f"at index {index}")
        before = message.role
    if before not in ("user", RESULT):
        raise BadRecord("messages: must end with a user turn", f"ends with {before}")


def _check_candidates(candidates: Any) -> None:
    if not isinstance(candidates, tuple) or len(candidates) < 2:
        found = len(candidates) if isinstance(candidates, tuple) else brief(candidates)
        raise BadRecord("candidates: fewer than two answers", str(found))
    for index, candidate in enumerate(candidates):
        if not isinstance(candidate, Candidate):
            raise BadRecord("candidates: not text or an object", f"at index {index}: {brief(candidate)}")
        _check_text(candidate.text, "candidates.text", index)
        _check_text(candidate.author, "candidates.author", index, empty_ok=True)
        if candidate.author_kind not in AUTHOR_KINDS:
            detail = f"at index {index}: {brief(candidate.author_kind)}"
            raise BadRecord(f"candidates.author_kind: not one of {', '.join(AUTHOR_KINDS)}", detail)
        score = candidate.score
        if score is not None and not _is_finite(score):
            raise BadRecord("candidates.score: not a finite number", f"at index {index}: {brief(score)}")
    if len({candidate.text for candidate in candidates}) < 2:
        raise BadRecord("candidates: fewer than two distinct answers")


def _check_ranks(ranks: Any, candidates: tuple[Candidate, ...]) -> None:
    if not isinstance(ranks, tuple) or len(ranks) != len(candidates):
        raise BadRecord("ranks: not one for each candidate", f"{len(candidates)} candidates, ranks {brief(ranks)}")
    if set(map(type, ranks)) != {int} or min(ranks) < 1:
        raise BadRecord("ranks: not whole numbers from 1 (best)", brief(ranks))
    texts = {candidate.text for candidate in candidates}
    if len(texts) < len(ranks) and len({(c.text, rank) for c, rank in zip(candidates, ranks)}) > len(texts):
        raise BadRecord("ranks: identical candidates have different ranks")


def _check_time(time: Any) -> None:
    if time is None:
        return
    _check_text(time, "time")
    try:
        datetime.fromisoformat(time)
    except ValueError:
        raise BadRecord("time: not ISO 8601", brief(time)) from None


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def brief(value: Any) -> str:
    """A value as a message shows it. `reprlib` bounds length and depth, because rows may be huge or deeply nested."""
    return reprlib.repr(value)
