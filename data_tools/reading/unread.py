"""What a field could hold, by its name (a prompt, a system turn, an answer, a judgement, media), and which fields of a
row could matter that an importer does not read, so that what a person wrote is never lost without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from rlhf.data.jsonl import OnReject
from rlhf.data.schema import BadRecord, brief

# ---- roles of fields -------------------------------------------------------------------------------------------------

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
"""What the field of a system turn is called, where an importer reads it."""
SYSTEM = {"system", "sysprompt"}
WINNERS = {
    "better",
    "best",
    "worse",
    "worst",
    "safer",
    "winner",
    "choice",
    "preference",
    "preferences",
    "tie",
    "verdict",
}
"""Words that make a name a judgement wherever they are in it, such as better_response_id and winner_model."""
METADATA = {
    "id", "ids", "uid", "uuid", "model", "models", "name", "source", "type", "category", "language", "lang", "time",
    "date", "timestamp", "tokens", "length", "len", "url", "hash", "index", "idx", "count", "by", "author", "ratio",
    "metadata", "meta", "info",
}  # fmt: skip
"""Last words of names that hold facts about something else: prompt_id, chosen_model."""
NAMES = {"id", "ids", "index", "idx", "model", "by"}
"""Last words that can name a winner."""
COUNTS = {"num", "number", "count", "has"}
WORDS = {
    "prompt": {
        "prompt", "prompts", "question", "questions", "query", "instruction", "instructions", "input", "inputs",
        "context", "history", "conversation", "conversations", "messages", "chat", "dialogue", "dialog", "passage",
        "document", "article", "post", "text", "tools", "functions",
    },
    "answer": {
        "answer", "answers", "response", "responses", "resp", "output", "outputs", "completion", "completions",
        "chosen", "rejected", "candidate", "candidates", "reply", "replies", "generation", "generations", "target",
        "targets", "preferred", "summary", "summaries", "solution", "demonstration",
    },
    "judgement": {
        "label", "labels", "rank", "ranks", "ranking", "rating", "ratings", "score", "scores", "vote", "votes",
        "upvotes", "judgement", "judgment", "grade", "thumbs", "feedback", "strength", "safe",
    },
    "media": {"image", "images", "audio", "audios", "video", "videos", "picture", "photo", "screenshot", "media"},
}  # fmt: skip
"""Role -> words of a name that give it that role: a word of a judgement, else the last such word counts."""


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``ResponseA`` and ``response_a`` are response and a."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())


def is_fact(name: str) -> bool:
    """Whether a name ends like that of a fact about something else: metadata, prompt_id."""
    words = [word for word in words_of(name[:200]) if len(word) > 1]
    return bool(words) and words[-1] in METADATA


@lru_cache(10_000)
def role_of(name: str) -> str | None:
    """prompt, system turn, answer, judgement or media; None where the name means neither."""
    words = [word for word in words_of(name[:200]) if len(word) > 1]
    if not words:
        return None
    facts = words[-1] in METADATA
    if WINNERS & set(words) and (not facts or words[-1] in NAMES):
        return "judgement"
    if facts or words[0] in COUNTS:
        return None
    if SYSTEM & set(words):
        return "system turn"
    if WORDS["judgement"] & set(words):
        return "judgement"
    return next((role for word in reversed(words) for role, known in WORDS.items() if word in known), None)


def says_something(value: Any, role: str) -> bool:
    """Whether a field of that role holds anything. A number alone is no prompt and no answer."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    if role in ("judgement", "media"):
        return value is not None and value != [] and value != {}
    return isinstance(value, (list, dict)) and bool(value)


# ---- fields that are not read ----------------------------------------------------------------------------------------

T = TypeVar("T")
HOLDS = {
    "prompt": "a prompt", "system turn": "a system turn", "answer": "an answer", "judgement": "a judgement",
    "media": "media",
}  # fmt: skip
"""Role -> how a message says it."""


class ReadFields(dict[str, Any]):
    """A row that remembers which of its fields were read: asked for by name, or all by `items` or `values`."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()
        self.followed: list[str] = []
        """Fields whose objects are `ReadFields` too."""

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return dict.__getitem__(self, name)  # every field of every row: quicker than super()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return dict.get(self, name, default)

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()


DEPTH = 10
"""Objects deeper in a row than this are not looked at."""


class NestedFields:
    """Finds the objects in a file's rows whose fields an importer does not read, at no cost for rows like those before.

    Which fields are read is noted for a row with an object of new fields only. Objects in one field of a row that have
    the same fields are taken to be read in the same way.

    Fields that need not be read are given by the name of one, its path with dots, or the field of the row it is in.

    Args:
        reject: Takes the rejects of an import; its `ignored_fields`, where it has some, need not be read.
        left_out: More fields that need not be read.
    """

    def __init__(self, reject: OnReject, left_out: Collection[str] = ()) -> None:
        self.ignored = {*left_out, *getattr(reject, "ignored_fields", ())}
        self._known: set[tuple[str, ...]] = set()
        """Field of the row and the fields of an object in it, where all that could matter were read."""

    def row(self, value: dict[str, Any]) -> ReadFields:
        """The row as `ReadFields`, and the objects in it too where some have new fields."""
        row = ReadFields(value)
        for name, inner in value.items():
            if (type(inner) is dict or type(inner) is list) and not self._is_known(name, inner, DEPTH):
                dict.__setitem__(row, name, _followed(inner, DEPTH))
                row.followed.append(name)
        return row

    def _is_known(self, name: str, value: Any, depth: int) -> bool:
        if type(value) is dict:
            if (name, *value) not in self._known:
                return False
            value = value.values()
        for inner in value if depth else ():
            if (type(inner) is dict or type(inner) is list) and not self._is_known(name, inner, depth - 1):
                return False
        return True

    def converted(self, convert: Callable[[Any], T], value: Any, used: Callable[[T], bool] = lambda _: True) -> T:
        """What `convert` makes of a row.

        Args:
            used: Whether anything of it can be used; if not, it does not matter what was not read.

        Raises:
            BadRecord: `convert` does, or the row has a `fault`.
        """
        row = self.row(value) if isinstance(value, dict) else value
        try:
            made = convert(row)
        except BadRecord:
            if not isinstance(row, ReadFields) or not row.followed:
                raise
            return convert(ReadFields(value))  # the same fault, with a message about the types that the file has
        if (fault := self.fault(row)) and used(made):
            raise fault
        return made

    def fault(self, row: Any) -> BadRecord | None:
        """The fault of a row with a field that was not read and could be a prompt, a system turn, an answer, a
        judgement or media; None where there is none.

        A text or list that repeats one that was read is no loss.

        Args:
            row: One of `row` after its record was made; of anything else nothing is known.
        """
        if not isinstance(row, ReadFields):
            return None
        unread = list(_unread(row, self.ignored))
        read: dict[tuple[str, ...], set[str]] = {}
        for name in row.followed:
            if name not in self.ignored and (name in row.read or not (role_of(name) or is_fact(name))):
                objects = list(_objects(name, dict.__getitem__(row, name), self.ignored))
                for _, inner in objects:
                    read.setdefault((name, *inner), set()).update(inner.read)
                for path, inner in objects:
                    inner.read = read[name, *inner]
                    lost = [(f"{path}.{field}", role, said) for field, role, said in _unread(inner, self.ignored, path)]
                    unread += lost
                    if not lost:
                        self._known.add((name, *inner))
            else:
                self._known.update((name, *inner) for _, inner in _objects(name, dict.__getitem__(row, name)))
        return _fault(unread, row) if unread else None


def _followed(value: Any, depth: int) -> Any:
    """The value, with each object in it as `ReadFields`."""
    if not depth:
        return value
    if isinstance(value, dict):
        return ReadFields({name: _followed(inner, depth - 1) for name, inner in value.items()})
    return [_followed(inner, depth - 1) for inner in value] if isinstance(value, list) else value


def _objects(path: str, value: Any, ignored: Collection[str] = ()) -> Iterator[tuple[str, ReadFields]]:
    """Every object in a value, with its path, but none in a field that is ignored."""
    if isinstance(value, ReadFields):
        yield path, value
        for name in value:
            if name not in ignored and f"{path}.{name}" not in ignored:
                yield from _objects(f"{path}.{name}", dict.__getitem__(value, name), ignored)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(path, inner, ignored)


def _unread(row: ReadFields, ignored: Collection[str], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Name, role and value of each field that was not read and could matter, whatever it holds."""
    for name in row:
        if name in row.read or name in ignored or f"{path}.{name}" in ignored:
            continue
        if role := role_of(name):
            yield name, role, dict.__getitem__(row, name)


def _fault(unread: list[tuple[str, str, Any]], row: ReadFields) -> BadRecord | None:
    """The fault of the first of some unread fields that says something new."""
    known = [_plain(dict.__getitem__(row, name)) for name in row.read if name in row]
    for name in row.followed:
        for _, inner in _objects(name, dict.__getitem__(row, name)):
            known += [_plain(dict.__getitem__(inner, field)) for field in inner.read if field in inner]
    lost = {
        name: (role, value)
        for name, role, value in unread
        if says_something(value, role) and (role in ("judgement", "media") or _plain(value) not in known)
    }
    if not lost:
        return None
    name, (role, value) = next(iter(lost.items()))
    words = " ".join(f"--ignore {each}" for each in lost)
    remedy = f"If it does not matter, leave it out: {words}. Else import by the mapping `csv`."
    return BadRecord(f"{name}: not read, and by its name it could hold {HOLDS[role]}", brief(value), remedy)


def _plain(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value
