"""All votes on a dataset of proposals: a journal that is only added to, and the rankings that follow from it.

PLACE.journal    a header, then every vote, one JSON object a line, in the order of arrival
PLACE.jsonl      the rankings that count now: a dataset of rankings at any time, made again from the journal

A vote counts once its line of the journal is on the disk. `Assignment` says which item an annotator gets next.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.io.locked_lines import LockedLines
from data_tools.ranking_page.votes import CANNOT_TELL, RANKED, SKIPPED, RankingItem, Vote, parse_vote
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.files import write_bytes
from rlhf.data.jsonl import parse, to_dict
from rlhf.data.schema import BadRecord

FORMAT, VERSION = "rlhf-ranking-journal", 1
OUT = "rankings-web.jsonl"
"""The default name, in the folder of the candidates."""


class VoteBook:
    """The votes on some items; a context manager that holds the files locked.

    Args:
        out: The JSONL file of rankings; the journal is next to it.
        items: What is voted on.
        fingerprint: That of the dataset of candidates; a journal of other candidates is refused.

    Raises:
        UserError: The files cannot be written, another process holds them, or they belong to something else.
    """

    def __init__(self, out: Path, items: Mapping[str, RankingItem], fingerprint: str) -> None:
        if out.suffix != ".jsonl":
            raise UserError(f"--out {out}: rankings are written as JSON lines", remedy="Name a file ending in .jsonl.")
        self.out, self.items, self.fingerprint = out, items, fingerprint
        self.latest: dict[tuple[str, str], Vote] = {}
        """(annotator, item) -> the vote that counts, in the order of the votes."""
        self._behind = True
        """Whether the file of rankings is another one than the journal gives."""
        self._made: set[bytes] = set()
        """While the files are read: every line that the rankings may have had."""
        self.versions: Counter[tuple[str, str]] = Counter()
        """(annotator, item) -> the number of votes so far, replaced ones included."""
        journal = out.with_suffix(".journal")
        if out.exists() and not journal.exists():
            remedy = "Name another --out; rankings of several files are read together."
            raise UserError(f"--out {out}: is there already, and was not made by `--web` or `--merge`", remedy=remedy)
        self._journal = LockedLines(journal, "End that one first, or name another --out.")
        try:
            self._read(self._journal.read())
            self._check_rankings()
            self.settle()
        except BaseException:
            self._journal.__exit__()
            raise

    def __enter__(self) -> VoteBook:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()

    # ---- reading

    def _read(self, data: bytes) -> None:
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            console.warn(f"{self._journal.path}: the last line was cut off in the middle; it is removed")
            self._journal.truncate(whole)
        lines = data[:whole].splitlines()
        if not lines:
            head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
            self._journal.append(_line(head))
            return
        self._check_header(lines[0])
        for number, line in enumerate(lines[1:], 2):
            try:
                vote = parse_vote(parse(line), self.items)
                self._take(vote)
                if vote.verdict == RANKED:
                    self._made.add(self._row(vote))
            except BadRecord as fault:
                console.warn(f"{self._journal.path}:{number}: skipped: {fault}")

    def _check_header(self, line: bytes) -> None:
        remedy = "Name another --out."
        try:
            head = parse(line)
        except BadRecord:
            head = None
        if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{self._journal.path}: is no journal of this version", remedy=remedy)
        if head.get("fingerprint") != self.fingerprint:
            why = "The candidates have changed since, or are others."
            raise UserError(f"{self._journal.path}: belongs to other candidates", why, remedy)

    def _check_rankings(self) -> None:
        """Refuse rankings that someone has edited: they would be replaced. A crash may leave half a line last."""
        lines = self.out.read_bytes().splitlines(keepends=True) if self.out.exists() else []
        for number, line in enumerate(lines, 1):
            if line not in self._made and line.endswith(b"\n"):
                why = f"The line is not what {self._journal.path} gives, and the file is made again from that."
                remedy = "Rename the file to keep it, or delete it. To change a ranking, rank its prompt again."
                raise UserError(f"{self.out}:{number}: was changed", why, remedy)
        self._made.clear()

    def _take(self, vote: Vote) -> bool:
        """Let a vote count; True if it replaces a ranking."""
        key = vote.annotator, vote.item
        before = self.latest.pop(key, None)
        self.latest[key] = vote
        self.versions[key] += 1
        return before is not None and before.verdict == RANKED

    # ---- writing

    def add(self, vote: Vote) -> None:
        """Add a vote; it is on the disk when this returns.

        Raises:
            UserError: The disk is full, or the like. Then the vote does not count.
        """
        self._journal.append(_line(vote.as_dict()))
        replaces = self._take(vote)
        self._behind |= replaces or not self.out.exists()
        if not self._behind and vote.verdict == RANKED:
            self._behind = True  # until the whole line is there
            with _reported(self.out), open(self.out, "ab") as file:
                file.write(self._row(vote))
            self._behind = False
        self.settle()

    def add_all(self, votes: Sequence[Vote]) -> None:
        """Add votes in one go, and make the rankings once; they are on the disk when this returns.

        Raises:
            UserError: The disk is full, or the like. Then none of the votes counts.
        """
        if votes:
            self._journal.append(b"".join(_line(vote.as_dict()) for vote in votes))
            for vote in votes:
                self._take(vote)
            self._behind = True
        self.settle()

    def settle(self) -> None:
        """Make the rankings again if they are not those of the journal.

        Raises:
            UserError: The disk is full, or the like. The votes are in the journal, and count.
        """
        if self._behind:
            with _reported(self.out):
                self._write_rankings()
            self._behind = False

    def _write_rankings(self) -> None:
        rows = [self._row(vote) for vote in self.latest.values() if vote.verdict == RANKED]
        if rows:
            write_bytes(self.out, b"".join(rows))
        else:
            self.out.unlink(missing_ok=True)  # an empty file would be no dataset

    def _row(self, vote: Vote) -> bytes:
        comment = {"comment": vote.comment} if vote.comment else {}
        return _line(to_dict(vote.ranking(self.items[vote.item])) | comment)

    # ---- counts

    def counts(self, annotator: str) -> dict[str, int]:
        """How many items an annotator has ranked, cannot tell, and skipped: `ranked`, `cannot_tell`, `skipped`."""
        found = Counter(vote.verdict for (name, _), vote in self.latest.items() if name == annotator)
        return {"ranked": found[RANKED], "cannot_tell": found[CANNOT_TELL], "skipped": found[SKIPPED]}

    def summary(self) -> dict[str, Any]:
        """out, journal, items, annotators (name -> counts), rankings (how many items have how many)."""
        names = dict.fromkeys(name for name, _ in self.latest)
        made = Counter(item for (_, item), vote in self.latest.items() if vote.verdict == RANKED)
        spread = Counter(made[item] for item in self.items)
        return {
            "out": str(self.out), "journal": str(self._journal.path), "items": len(self.items),
            "annotators": {name: self.counts(name) for name in names},
            "rankings": {str(count): spread[count] for count in sorted(spread)},
        }  # fmt: skip


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Errors of writing a file as the one error of the program."""
    try:
        yield
    except OSError as error:
        remedy = "Free disk space, or make the folder writable. Votes are kept in the journal."
        raise UserError(f"{path}: cannot be written: {error}", remedy=remedy) from None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


# ---- which item an annotator gets next -------------------------------------------------------------------------------

RECENT = 50
"""The time left is estimated from so many of an annotator's last votes."""


class Assignment:
    """Hands out the items with the fewest rankings first, in the order of the candidates.

    An item that another annotator has open counts as ranked once more, so two annotators work on different items. If
    only items are left that others have open, these are held back, and given to an annotator who asks for them.

    Args:
        book: The votes so far.
        per_item: Rankings that are wanted of each item; None for one by every annotator.
    """

    def __init__(self, book: VoteBook, per_item: int | None = None) -> None:
        self.book, self.per_item = book, per_item
        self._open: dict[str, str] = {}
        """Annotator -> the item on their screen."""

    def next(self, annotator: str, held_too: bool = False) -> tuple[RankingItem | None, bool]:
        """The item to rank now, and whether the annotator has skipped it before; skipped items come last.

        The same item is given until the annotator has voted on it. None if nothing is left, or only what others have
        open; `held_too` gives that, too.
        """
        waiting = self._waiting(annotator)
        now = self._open.pop(annotator, None)
        if now not in waiting or self._verdict(annotator, now) == SKIPPED:
            load = self._load()
            free = [name for name in waiting if held_too or self.per_item is None or load[name] < self.per_item]
            fresh = [name for name in free if self._verdict(annotator, name) != SKIPPED]
            skipped = [name for who, name in self.book.latest if who == annotator and name in free]
            now = min(fresh, key=load.__getitem__) if fresh else next(iter(skipped), None)
        if now is None:
            return None, False
        self._open[annotator] = now
        return self.book.items[now], self._verdict(annotator, now) == SKIPPED

    def progress(self, annotator: str) -> dict[str, Any]:
        """ranked, cannot_tell and skipped items of the annotator, how many are left (skipped ones included), and the
        median seconds of the last votes (None before the third)."""
        took = [
            vote.seconds for (who, _), vote in self.book.latest.items() if who == annotator and vote.verdict == RANKED
        ]
        median = statistics.median(took[-RECENT:]) if len(took) >= 3 else None
        return {**self.book.counts(annotator), "left": len(self._waiting(annotator)), "seconds": median}

    def history(self, annotator: str) -> list[str]:
        """The items that the annotator has decided on, in the order of the votes."""
        return [item for (who, item), vote in self.book.latest.items() if who == annotator and vote.verdict != SKIPPED]

    def _verdict(self, annotator: str, item: str) -> str:
        vote = self.book.latest.get((annotator, item))
        return vote.verdict if vote else ""

    def _waiting(self, annotator: str) -> dict[str, None]:
        """The items that the annotator has still to decide on, and of which rankings are wanted."""
        full = set()
        if self.per_item is not None:
            full = {name for name, count in self._rankings().items() if count >= self.per_item}
        decided = (RANKED, CANNOT_TELL)
        return {
            name: None for name in self.book.items if name not in full and self._verdict(annotator, name) not in decided
        }

    def _rankings(self) -> dict[str, int]:
        counts = dict.fromkeys(self.book.items, 0)
        for (_, item), vote in self.book.latest.items():
            counts[item] += vote.verdict == RANKED
        return counts

    def _load(self) -> dict[str, int]:
        counts = self._rankings()
        for item in self._open.values():
            counts[item] += 1
        return counts
