"""Which prompt an annotator gets next."""

from __future__ import annotations

import statistics
from typing import Any

from data_tools.ranking_page.book import VoteBook
from data_tools.ranking_page.votes import CANNOT_TELL, RANKED, SKIPPED, RankingItem

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
