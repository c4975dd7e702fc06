"""`rlhf report --watch`: the page served on this machine alone, updated while the runs train."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import markupsafe

from rlhf.core.errors import UserError
from rlhf.core.loopback import HttpReply, LoopbackServer
from rlhf.report.gather import chain
from rlhf.report.page import policy
from rlhf.report.pipelines import folders_of
from rlhf.runs.lock import in_use

REFRESH = 5
"""Seconds between two looks of an open page."""
LOGS = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "updates")
"""What a run writes into its folder while it trains, besides JSON files; evaluations are JSON files, too."""
WAITING = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{seconds}">'
    "<title>Waiting</title><p>{message}</p>"
)
WAITING_POLICY = "default-src 'none'; frame-ancestors 'none'"


class LivePage:
    """The page of some runs, drawn again when one of their files has changed, and never twice at once.

    Args:
        paths: Run folders, folders with a pipeline's runs, or pipeline files; folders need not exist yet.
        draw: Gives the page's HTML.
    """

    def __init__(self, paths: Sequence[Path], draw: Callable[[], str]) -> None:
        self.paths, self.draw = paths, draw
        self._drawing = threading.Lock()
        self._seen: list[tuple[str, int, int]] | None = None
        self._reply: HttpReply | None = None

    def reply(self, body: bytes = b"") -> HttpReply:
        """The page as it is now. While it is being drawn, others get the one before."""
        if self._reply is not None and not self._drawing.acquire(blocking=False):
            return self._reply
        if self._reply is None:
            self._drawing.acquire()
        try:
            now = sorted(self._files())
            if self._reply is None or now != self._seen:
                self._reply, self._seen = self._drawn(), now
            return self._reply
        finally:
            self._drawing.release()

    def _drawn(self) -> HttpReply:
        try:
            return HttpReply(self.draw().encode(), "text/html", policy=policy(live=True))
        except UserError as error:
            text = WAITING.format(seconds=REFRESH, message=markupsafe.escape(str(error)))
            return HttpReply(text.encode(), "text/html", policy=WAITING_POLICY)

    @staticmethod
    def _folders(path: Path) -> list[Path]:
        with suppress(UserError):  # the page says what is wrong
            folders = folders_of(path)
            with suppress(UserError):
                return chain(folders)
            return folders
        return []

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Name, time and size of the files that the page is drawn from, and whether a process works on each run."""
        for path in self.paths:
            for folder in self._folders(path):
                yield str(folder), 0, in_use(folder)
                for file in (*map(folder.joinpath, LOGS), *folder.glob("*.json")):
                    with suppress(OSError):
                        facts = file.stat()
                        yield str(file), facts.st_mtime_ns, facts.st_size


def watch(live: LivePage, port: int, say: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C.

    Raises:
        UserError: The port is not free.
    """
    server = LoopbackServer({("GET", ""): live.reply}, port)
    try:
        say(f"Open {server.url}")
        say("Only this machine reaches it, and only with this address. Ctrl-C ends.")
        server.serve()
    except KeyboardInterrupt:
        say("")
    finally:
        server.close()
