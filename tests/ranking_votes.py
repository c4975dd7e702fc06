"""Candidates of prompts, and votes on them as the ranking page sends them."""

from __future__ import annotations

from pathlib import Path

from rows import write

from data_tools.ranking_page.book import VoteBook
from data_tools.ranking_page.server import open_book, open_items
from rlhf.data.schema import Candidate, Message, Proposal
from rlhf.data.store import open_dataset


def proposal(number: int, answers: int = 3) -> Proposal:
    candidates = tuple(Candidate(f"Answer {number}.{k}", f"author {k}", "model") for k in range(answers))
    return Proposal((Message("user", f"Question {number}?"),), "test", "g", "train", candidates)


def write_candidates(folder: Path) -> Path:
    """Four proposals on disk, in `folder / "candidates"`."""
    return write(folder / "candidates", [proposal(i) for i in range(4)]).path


def vote(item, tiers=((2,), (0, 1)), **changes):
    """A vote in its JSON form."""
    return {
        "annotator": "anna", "item": item, "verdict": "ranked", "mode": "rank", "order": [1, 2, 0], "tiers": tiers,
        "seconds": 3.25, "time": "2026-01-02T03:04:05+00:00", "comment": "", "vote": "",
    } | changes  # fmt: skip


def book(candidates, name="r.jsonl") -> VoteBook:
    return open_book(*open_items(candidates), candidates.parent / name)


def ranks(path):
    return {r.messages[0].content: r.ranks for r in open_dataset(path, "ranking").records()}
