"""`rlhf data rank --web`: the page on loopback, and what its requests do.

The page keeps its address when the command is run again: open pages and bookmarks go on, and so do drafts, which
browsers keep by address.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_tools.ranking_page.book import OUT, Assignment, VoteBook
from data_tools.ranking_page.page import Settings, policy, render
from data_tools.ranking_page.votes import RankingItem, Vote, annotator_name, items_of, parse_vote
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.loopback import HttpReply, LoopbackServer, Routes, json_reply
from rlhf.data.jsonl import parse
from rlhf.data.schema import BadRecord
from rlhf.data.store import Dataset, open_dataset

# ---- its address -----------------------------------------------------------------------------------------------------

SUFFIX = ".address"
"""Of the file next to the rankings that holds port and token; only its owner can read it."""


def server_at(file: Path, routes: Routes, port: int = 0) -> LoopbackServer:
    """A server at the address in a file, which is written.

    Args:
        file: Where the address is kept. Without it, or if it cannot be read, the address is a new one.
        routes: See `LoopbackServer`.
        port: The port; 0 takes that of the file if it is free, else any.

    Raises:
        UserError: The port that was asked for is not free, or the file cannot be written.
    """
    token, before = _read_address(file)
    try:
        server = LoopbackServer(routes, port or before, token)
    except UserError:
        if port:
            raise
        server = LoopbackServer(routes, 0, token)
    try:
        file.unlink(missing_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as out:
            json.dump({"port": server.port, "token": server.token}, out)
    except OSError as error:
        server.close()
        remedy = "Make the folder writable, or name another place with --out."
        raise UserError(f"{file}: cannot be written: {error}", remedy=remedy) from None
    return server


def _read_address(file: Path) -> tuple[str | None, int]:
    """Token and port; None and 0 if there are none, or if others could have read or written them."""
    try:
        if file.stat().st_mode & 0o077 or file.stat().st_uid != os.getuid():
            return None, 0
        found = json.loads(file.read_text("utf-8"))
        token, port = found["token"], found["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0
    good = isinstance(token, str) and token.isascii() and len(token) >= 22 and "/" not in token
    return (token, port) if good and type(port) is int and 0 < port < 65536 else (None, 0)


# ---- its requests ----------------------------------------------------------------------------------------------------


class Desk:
    """Serves annotators, one request at a time.

    Args:
        book: Takes the votes.
        settings: What the page shows.
        per_item: See `Assignment`.
    """

    def __init__(self, book: VoteBook, settings: Settings, per_item: int | None = None) -> None:
        self.book, self.assignment = book, Assignment(book, per_item)
        self._lock = threading.Lock()
        self._tabs: dict[str, set[str]] = {}
        self._page = HttpReply(render(settings).encode(), "text/html", policy=policy(online=True))

    def routes(self) -> Routes:
        """See `LoopbackServer`."""
        actions = {"join": self.join, "next": self.next, "open": self.open, "save": self.save}
        posts = {("POST", name): self._locked(action) for name, action in actions.items()}
        return {("GET", ""): lambda _: self._page, **posts}

    def _locked(self, action: Any) -> Any:
        def handle(body: bytes) -> HttpReply:
            try:
                request = parse(body)
                if not isinstance(request, dict):
                    raise BadRecord("not an object", type(request).__name__)
                name = annotator_name(request.get("annotator"))
                with self._lock:
                    return action(name, request)
            except BadRecord as fault:
                return json_reply({"error": str(fault)}, 400)

        return handle

    # ---- what the page asks for

    def join(self, annotator: str, request: dict[str, Any]) -> HttpReply:
        """Somebody starts or comes back.

        `shared` says that another tab has joined under the same name; `namesake` is the name of someone who has
        voted, if this one differs from it in capitals alone, as phones make them, and has not.
        """
        tabs = self._tabs.setdefault(annotator, set())
        tab = request.get("tab")
        shared = bool(tabs - {tab})
        if isinstance(tab, str) and len(tab) <= 64:
            tabs.add(tab)
        found = {"annotator": annotator, "history": self.assignment.history(annotator), "shared": shared}
        return json_reply(found | {"namesake": self._namesake(annotator)} | self._next(annotator))

    def _namesake(self, annotator: str) -> str:
        names = {name for name, _ in self.book.latest}
        return "" if annotator in names else next((n for n in names if n.casefold() == annotator.casefold()), "")

    def next(self, annotator: str, request: dict[str, Any]) -> HttpReply:
        """The item to rank now; with `held_too`, also one that others have open."""
        return json_reply(self._next(annotator, request.get("held_too") is True))

    def open(self, annotator: str, request: dict[str, Any]) -> HttpReply:
        """An item with the annotator's vote on it."""
        item = request.get("item")
        if not isinstance(item, str) or item not in self.book.items:
            raise BadRecord("item: not one of the candidates")
        return json_reply(self._task(annotator, self.book.items[item]))

    def save(self, annotator: str, request: dict[str, Any]) -> HttpReply:
        """Take a vote. The reply comes after it is on the disk, and holds the next item.

        `version` is the number of votes on the item that the page knows of; if another tab has voted since, nothing is
        taken, and the reply (409) holds the item as it is now.
        """
        row = request.get("vote")
        if not isinstance(row, dict):
            raise BadRecord("vote: not an object", type(row).__name__)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        vote = parse_vote({**row, "annotator": annotator, "time": time}, self.book.items)
        if self._is_repeated(vote):
            self.book.settle()
        else:
            if request.get("version") != self.book.versions[annotator, vote.item]:
                return json_reply(self._task(annotator, self.book.items[vote.item]), 409)
            self.book.add(vote)
        return json_reply(self._next(annotator))

    def _is_repeated(self, vote: Vote) -> bool:
        """Whether the vote is here already, and only the reply to it was lost."""
        before = self.book.latest.get((vote.annotator, vote.item))
        return bool(vote.vote) and before is not None and before.vote == vote.vote

    def _next(self, annotator: str, held_too: bool = False) -> dict[str, Any]:
        item, skipped = self.assignment.next(annotator, held_too)
        task = None if item is None else self._task(annotator, item)
        return {"task": task, "skipped": skipped, "progress": self.assignment.progress(annotator)}

    def _task(self, annotator: str, item: RankingItem) -> dict[str, Any]:
        key = annotator, item.id
        vote = self.book.latest.get(key)
        return {
            "item": item.shown(), "version": self.book.versions[key], "vote": vote.as_dict() if vote else None,
            "progress": self.assignment.progress(annotator),
        }  # fmt: skip


def open_items(candidates: str | Path) -> tuple[Dataset, dict[str, RankingItem]]:
    """A dataset of proposals, and its items.

    Raises:
        UserError: No such proposals.
    """
    dataset = open_dataset(candidates, "proposal")
    items = items_of(dataset.records())
    if dataset.rejects:
        console.warn(f"{dataset.path}: bad rows that are left out: {len(dataset.rejects)}; see `rlhf data validate`")
    return dataset, items


def open_book(dataset: Dataset, items: dict[str, RankingItem], out: Path | None) -> VoteBook:
    """The votes on a dataset, by default next to it."""
    return VoteBook(dataset.path.parent / OUT if out is None else out, items, dataset.fingerprint)


def rank_in_browser(
    candidates: str | Path,
    out: Path | None = None,
    *,
    mode: str = "rank",
    seed: int = 0,
    per_item: int | None = None,
    port: int = 0,
) -> dict[str, Any]:
    """Serve the page until Ctrl-C.

    Args:
        candidates: A dataset of proposals.
        out: The JSONL file of rankings; `OUT` in the candidates' folder by default.
        mode: `rank` or `best-worst`.
        seed: Shuffles the answers, differently for each annotator.
        per_item: See `Assignment`.
        port: Of the server; 0 for that of the last time if it is free, else any.

    Returns:
        See `VoteBook.summary`.

    Raises:
        UserError: No such proposals, a port that is not free, or a file that cannot be written.
    """
    dataset, items = open_items(candidates)
    settings = Settings(dataset.fingerprint, mode, seed, len(items))
    with open_book(dataset, items, out) as book:
        server = server_at(book.out.with_suffix(SUFFIX), Desk(book, settings, per_item).routes(), port)
        try:
            console.say(f"Open this page to rank {len(items):,} prompts; each annotator enters a name:")
            console.say(server.url)
            console.say(f"Every click is saved at once, to {book.out}. Ctrl-C ends.")
            server.serve()
        except KeyboardInterrupt:
            console.say("")  # the summary has a line of its own
        finally:
            server.close()
        return book.summary()


def show(summary: dict[str, Any]) -> None:
    """Print a summary of `VoteBook`."""
    rows = [[name, *counts.values()] for name, counts in summary["annotators"].items()]
    if not rows:
        console.say("no vote yet; the same command continues")
        return
    console.table("votes", ["annotator", "ranked", "cannot tell", "skipped"], rows)
    spread = ", ".join(f"{items:,} with {count}" for count, items in summary["rankings"].items())
    console.say(f"prompts by their number of rankings: {spread} -> {summary['out']}")
