"""What an annotator decides about one prompt on the page, checked, and the ranking that it becomes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rlhf.core.console import printable
from rlhf.data.schema import BadRecord, Proposal, Ranking, brief

RANKED, CANNOT_TELL, SKIPPED = "ranked", "cannot-tell", "skipped"
VERDICTS = (RANKED, CANNOT_TELL, SKIPPED)
"""`cannot-tell` is a decision and is not asked again; a skipped prompt comes again after the others."""
RANK, BEST_WORST = "rank", "best-worst"
MODES = (RANK, BEST_WORST)
REQUIRED = ("annotator", "verdict", "mode", "order", "seconds", "time")
"""Fields of a vote's JSON form, besides `item`; the others have a default."""
LONGEST_NAME, LONGEST_COMMENT = 80, 2000
"""Characters."""
LONGEST_TIME = 7 * 86400
"""Seconds that a ranking may take; more is a fault of the clock."""


class RankingItem:
    """A proposal as the page shows it: answers with the same text are one answer.

    Args:
        proposal: Its `id` is the item's.
    """

    def __init__(self, proposal: Proposal) -> None:
        self.proposal, self.id = proposal, proposal.id
        members: dict[str, list[int]] = {}
        for index, candidate in enumerate(proposal.candidates):
            members.setdefault(candidate.text, []).append(index)
        self.answers = tuple(members)
        """The distinct texts. Votes refer to an answer by its index here."""
        self.members = tuple(map(tuple, members.values()))
        """For each answer, the indices of the candidates with that text."""

    def shown(self) -> dict[str, Any]:
        """What the page gets: nothing of it says who wrote an answer."""
        turns = [{"role": message.role, "text": message.content} for message in self.proposal.messages]
        return {"id": self.id, "turns": turns, "answers": list(self.answers)}


def items_of(proposals: Iterable[Proposal]) -> dict[str, RankingItem]:
    """Id -> item, in order; a proposal that comes again is left out."""
    return {proposal.id: RankingItem(proposal) for proposal in proposals}


@dataclass(frozen=True)
class Vote:
    """One decision. A later one of the same annotator on the same item replaces it."""

    annotator: str
    item: str
    verdict: str
    mode: str
    order: tuple[int, ...]
    """The item's answers in the order shown."""
    tiers: tuple[tuple[int, ...], ...]
    """Answers by place, best first; those in one tier are tied. Empty unless the verdict is `ranked`."""
    seconds: float
    """How long the page was in view with this prompt."""
    time: str
    """ISO 8601."""
    comment: str = ""
    vote: str = ""
    """A random name by which a vote that is sent twice is recognised."""

    def as_dict(self) -> dict[str, Any]:
        """Its JSON form; `parse_vote` reads it back."""
        return asdict(self)

    def ranking(self, item: RankingItem) -> Ranking:
        """The ranking, with the candidates in the order shown.

        In the best-worst mode all answers between best and worst are tied: 1, 2, ..., 2, 3.
        """
        rank = {answer: place for place, tier in enumerate(self.tiers, 1) for answer in tier}
        shown = [(index, rank[answer]) for answer in self.order for index in item.members[answer]]
        one = item.proposal
        return Ranking(
            *one.prompt_fields, tuple(one.candidates[index] for index, _ in shown),
            tuple(place for _, place in shown), annotator=self.annotator, time=self.time, seconds=self.seconds,
            shown=True,
        )  # fmt: skip


def annotator_name(value: Any) -> str:
    """A name as it is kept: Unicode NFC, single spaces.

    Raises:
        BadRecord: No text, empty, too long, or with control characters.
    """
    if not isinstance(value, str):
        raise BadRecord("annotator: not text", type(value).__name__)
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if not name:
        raise BadRecord("annotator: empty", remedy="Enter a name.")
    if len(name) > LONGEST_NAME:
        raise BadRecord(f"annotator: longer than {LONGEST_NAME} characters", remedy="Enter a shorter name.")
    if printable(name) != name:
        raise BadRecord("annotator: has characters that cannot be seen", remedy="Enter a name of letters.")
    return name


def parse_vote(row: Any, items: Mapping[str, RankingItem]) -> Vote:
    """A vote from its JSON form, checked against the item.

    Raises:
        BadRecord: A field is missing or wrong.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("not an object", type(row).__name__)
    item = items.get(row["item"]) if isinstance(row.get("item"), str) else None
    if item is None:
        raise BadRecord("item: not one of the candidates", brief(row.get("item")), "Use the dataset it was made from.")
    if absent := [name for name in REQUIRED if name not in row]:
        raise BadRecord(f"{absent[0]}: is missing")
    verdict, mode = _one_of(row, "verdict", VERDICTS), _one_of(row, "mode", MODES)
    everything = list(range(len(item.answers)))
    order = _indices(row.get("order"))
    if sorted(order) != everything:
        raise BadRecord("order: not every answer once", brief(row.get("order")))
    tiers = _tiers(row.get("tiers", []))
    if verdict != RANKED and tiers:
        raise BadRecord("tiers: given without the verdict ranked", brief(row["tiers"]))
    if verdict == RANKED:
        if sorted(answer for tier in tiers for answer in tier) != everything or not all(tiers):
            raise BadRecord("tiers: not every answer once", brief(row.get("tiers")))
        if mode == BEST_WORST and [len(tier) for tier in tiers] != best_worst_sizes(len(everything)):
            raise BadRecord("tiers: not one best and one worst answer", brief(row["tiers"]))
    return Vote(
        annotator_name(row.get("annotator")), item.id, verdict, mode, order, tiers, _seconds(row.get("seconds")),
        _time(row.get("time")), _comment(row.get("comment", "")), _short_text(row.get("vote", "")),
    )  # fmt: skip


def best_worst_sizes(count: int) -> list[int]:
    """The number of answers in each tier of a best-worst choice."""
    return [1, 1] if count == 2 else [1, count - 2, 1]


def _one_of(row: Mapping[str, Any], field: str, allowed: Sequence[str]) -> str:
    if row.get(field) not in allowed:
        raise BadRecord(f"{field}: not one of {', '.join(allowed)}", brief(row.get(field)))
    return str(row[field])


def _indices(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(index) is int for index in value):
        raise BadRecord("order: not a list of whole numbers", brief(value))
    return tuple(value)


def _tiers(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        raise BadRecord("tiers: not a list of lists", brief(value))
    return tuple(map(_indices, value))


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= LONGEST_TIME:
        raise BadRecord(f"seconds: not a number from 0 to {LONGEST_TIME}", brief(value))
    return round(float(value), 1)


def _time(value: Any) -> str:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise BadRecord("time: not ISO 8601 with a time zone", brief(value))
    return str(value)


def _comment(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_COMMENT:
        raise BadRecord(f"comment: not text of at most {LONGEST_COMMENT} characters", brief(value))
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRecord("comment: not valid Unicode (a lone surrogate)")
    return value.strip()


def _short_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64 or not value.isascii():
        raise BadRecord("vote: not a short name", brief(value))
    return value
