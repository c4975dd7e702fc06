"""One person ranks proposals at a terminal.

Every ranking is one line of a JSONL file, on the disk before the next proposal is shown. The file is a dataset of
rankings at any time, and it alone says what is left to do, so a session may end in any way and continue later.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from data_tools.io.locked_lines import LockedLines
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.jsonl import Reject, from_dict, parse, read_jsonl, to_dict
from rlhf.data.schema import BadRecord, Proposal, Ranking, content_hash
from rlhf.data.store import open_dataset

WIDEST = 100
"""Columns of text, on however wide a terminal."""
HELP = """\
  2 > 1 = 4 > 3   answer 2 is best, 1 and 4 are equal, 3 is worst: every answer once
  2143            the same way without ties, also 2 1 4 3
  u   take the last ranking or skip back      s   skip until the next session
  q   quit; the same command continues        h   show this"""


def key(record: Proposal) -> str:
    """What a ranking has in common with the proposal that it ranks: the prompt, and the answers in their order."""
    return content_hash(record.prompt_id, record.answers)


# ---- parsing an order ----------------------------------------------------------------------------------


def parse_order(text: str, count: int) -> tuple[int, ...]:
    """Ranks of the answers 1..count (1 = best, equal = tie) from an order such as ``2 > 1 = 4 > 3``.

    Spaces and commas count as ``>``. With fewer than ten answers every digit is an answer, so ``2143`` will do.

    Raises:
        ValueError: An answer is missing, appears twice or is unknown; the message is for the annotator.
    """
    number = r"\d" if count < 10 else r"\d+"
    ranks: dict[int, int] = {}
    rank, sign = 0, ""
    for token in re.findall(rf"{number}|[^\s,]", text, re.ASCII):
        if token in (">", "="):
            if sign or not ranks:
                raise ValueError(f"{token} needs an answer on both sides")
            sign = token
        elif not (token.isascii() and token.isdecimal()):
            raise ValueError(f"{token!r} is neither an answer's number nor > or =")
        elif not 1 <= int(token) <= count:
            raise ValueError(f"there is no answer {token}; they are numbered 1 to {count}")
        elif int(token) in ranks:
            raise ValueError(f"answer {token} appears twice")
        else:
            rank += sign != "="
            ranks[int(token)] = rank
            sign = ""
    if sign:
        raise ValueError(f"{sign} needs an answer on both sides")
    missing = [str(answer) for answer in range(1, count + 1) if answer not in ranks]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; every answer must appear once")
    return tuple(ranks[answer] for answer in range(1, count + 1))


def show_order(ranks: Sequence[int]) -> str:
    """Ranks as an order: (2, 1, 3, 2) is ``2 > 1 = 4 > 3``."""
    tied = (
        " = ".join(str(i + 1) for i, rank in enumerate(ranks) if rank == found) for found in range(1, max(ranks) + 1)
    )
    return " > ".join(tied)


# ---- the file ----------------------------------------------------------------------------------------------------


class RankingsFile:
    """A JSONL file of rankings that is added to; a context manager. One process at a time may hold it.

    A line is written in one piece and flushed to the disk; taking the last one back truncates the file. A last line
    that a crash left half written is cut off when the file is opened, with a warning.

    Raises:
        UserError: It cannot be written, another process holds it, or it holds something else than rankings.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".jsonl":
            raise UserError(f"--out {path}: rankings are written as JSON lines", remedy="Name a file ending in .jsonl.")
        self.path = path
        remedy = "End that one, or name another file: every annotator may have one."
        self._lines = LockedLines(path, remedy)
        self._cut_half_line()
        self.rankings: list[Ranking] = list(read_jsonl(path, "ranking", self._refuse))

    def _refuse(self, reject: Reject) -> None:
        raise UserError(str(reject), "New rankings would be added to this file.", "Name another --out.")

    def _cut_half_line(self) -> None:
        data = self._lines.read()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        try:
            from_dict(parse(tail), "ranking")
        except BadRecord:
            self._lines.truncate(len(data) - len(tail))
            console.warn(f"{self.path}: the last line was cut off in the middle; that prompt is asked again")
        else:
            self._lines.append(b"\n")

    def __enter__(self) -> RankingsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()

    def add(self, ranking: Ranking) -> None:
        """Write a ranking; it is on the disk when this returns."""
        self._lines.append(json.dumps(to_dict(ranking), ensure_ascii=False).encode() + b"\n")
        self.rankings.append(ranking)

    def take_back(self) -> Ranking:
        """Remove the last ranking of the file, and return it."""
        data = self._lines.read()
        self._lines.truncate(data.rfind(b"\n", 0, len(data) - 1) + 1)
        return self.rankings.pop()


# ---- the session -------------------------------------------------------------------------------------------------


def default_out(candidates: Path, annotator: str) -> Path:
    """`rankings-NAME.jsonl` in the candidates' folder; characters that a file name cannot have become a hyphen."""
    name = re.sub(r"[^\w.-]+", "-", annotator)
    return candidates.parent / f"rankings-{name}.jsonl"


def rank(candidates: str | Path, annotator: str, out: str | Path | None = None) -> dict[str, Any]:
    """Ask for the rankings that are still missing, until all are there or the person quits (q, or end of input).

    Args:
        candidates: A dataset of proposals.
        annotator: Who ranks, a name as `ranking_page.votes.annotator_name` gives it; proposals that the file holds a
            ranking of by this name are not asked again.
        out: The JSONL file; see `default_out`.

    Returns:
        out, annotator, proposals, ranked (by this annotator, earlier sessions included), left, skipped.

    Raises:
        UserError: No such proposals, or a file that cannot be written.
        KeyboardInterrupt: Ctrl-C, after the summary was shown.
    """
    dataset = open_dataset(candidates, "proposal")
    proposals = {key(proposal): proposal for proposal in dataset.records()}
    if dataset.rejects:
        console.warn(f"{dataset.path}: bad rows that are left out: {len(dataset.rejects)}; see `rlhf data validate`")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # an invalid byte is a typing error, not the end of the session
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing for input()
    path = default_out(dataset.path, annotator) if out is None else Path(out)
    with RankingsFile(path) as file:
        session = Session(proposals, annotator, file)
        try:
            session.run()
        finally:
            session.close()
        return session.summary()


class Session:
    """One session of one annotator.

    Args:
        proposals: Proposals to rank by their key, in the order of the questions.
        annotator: Who ranks.
        file: Takes the rankings.
    """

    def __init__(self, proposals: dict[str, Proposal], annotator: str, file: RankingsFile) -> None:
        self.proposals, self.annotator, self.file = proposals, annotator, file
        mine = [r for r in file.rankings if r.annotator == annotator and key(r) in proposals]
        self.done = {key(ranking): ranking for ranking in mine}
        self.waiting = deque(name for name in proposals if name not in self.done)
        self.history: list[Ranking | str] = [*mine]
        """What was ranked, and the keys of what was skipped in this session."""
        self.console = console.out()
        self.console.width = min(self.console.width, WIDEST)

    def run(self) -> None:
        """Ask until nothing is left or the person quits."""
        line = f"Order the answers from best to worst. Each ranking is saved at once, to {self.file.path}"
        self.console.print(console.printable(line), markup=False)
        self.console.print(HELP, markup=False)
        while self.waiting:
            proposal = self.proposals[self.waiting[0]]
            self.show(proposal)
            if not self.ask(proposal):
                return

    # ---- output

    def show(self, proposal: Proposal) -> None:
        """The prompt and its answers, without saying who wrote them."""
        here = len(self.done) + self._skips() + 1
        title = f"{here} of {len(self.proposals)}"
        if left := self._minutes_left():
            title += f" · about {left} left"
        self.console.print(Rule(title, style="cyan"))
        for message in proposal.messages:
            self.console.print(Text(message.role, "bold cyan"))
            self.console.print(Padding(_safe(message.content), (0, 0, 1, 2)))
        for number, candidate in enumerate(proposal.candidates, 1):
            grid = Table.grid("", Column(overflow="fold"), padding=(0, 1))
            grid.add_row(Text(f" {number} ", "bold reverse"), _safe(candidate.text))
            self.console.print(Padding(grid, (0, 0, 1, 0)))

    def _skips(self) -> int:
        return sum(isinstance(item, str) for item in self.history)

    def _minutes_left(self) -> str:
        """By the median time of the last 50 rankings; nothing before the third."""
        took = [r.seconds for r in self.done.values() if r.seconds is not None][-50:]
        if len(took) < 3:
            return ""
        minutes = statistics.median(took) * len(self.waiting) / 60
        return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(1, round(minutes))} min"

    # ---- input

    def ask(self, proposal: Proposal) -> bool:
        """Read commands until the next proposal; False when the annotator quits."""
        begun = time.monotonic()
        while True:
            try:
                said = input("order> ").strip()
            except (EOFError, KeyboardInterrupt) as end:
                self.console.print()  # the summary has a line of its own
                if isinstance(end, EOFError):
                    return False
                raise
            word = said.lower()
            if word in ("q", "quit"):
                return False
            if word in ("s", "skip"):
                self.history.append(self.waiting.popleft())
                return True
            if word in ("u", "undo"):
                if self.undo():
                    return True
            elif word in ("h", "help", "?"):
                self.console.print(HELP, markup=False)
            elif said and self.take(proposal, said, time.monotonic() - begun):
                return True

    def take(self, proposal: Proposal, said: str, seconds: float) -> bool:
        """Save the typed order as a ranking; False, after an error message, where it is invalid."""
        try:
            ranks = parse_order(said, len(proposal.candidates))
            ranking = Ranking(
                *proposal.prompt_fields, proposal.candidates, ranks,
                annotator=self.annotator, time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(seconds, 1), shown=True,
            )  # fmt: skip
        except ValueError as fault:  # BadRecord is one: identical answers with different ranks
            self.console.print(f"Not taken: {console.printable(str(fault))}. h shows how.", style="red", markup=False)
            return False
        self.file.add(ranking)
        self.history.append(ranking)
        self.done[self.waiting.popleft()] = ranking
        self.console.print(f"Saved: {show_order(ranking.ranks)}", style="green", markup=False)
        return True

    def undo(self) -> bool:
        """Undo the last ranking or skip and ask again; False where there is none."""
        last = self.history[-1] if self.history else None
        if isinstance(last, str):
            name = last
        elif last is not None and self.file.rankings[-1] == last:
            name = key(self.file.take_back())
            self.done.pop(name, None)
        else:
            self.console.print("There is nothing to take back.", style="red")
            return False
        self.history.pop()
        self.waiting.appendleft(name)
        self.console.print("Taken back; here it is again.", style="yellow")
        return True

    # ---- the end

    def summary(self) -> dict[str, Any]:
        """See `rank`."""
        ranked = len(self.done)
        counts = {"proposals": len(self.proposals), "ranked": ranked, "left": len(self.proposals) - ranked}
        return {"out": str(self.file.path), "annotator": self.annotator, **counts, "skipped": self._skips()}

    def close(self) -> None:
        """Print the summary."""
        found = self.summary()
        line = f"{found['ranked']} of {found['proposals']} ranked -> {found['out']}"
        if found["left"]:
            line += f"; {found['left']} left ({found['skipped']} skipped). The same command continues."
        self.console.print(line, markup=False, soft_wrap=True)


def _safe(text: str) -> Text:
    return Text(console.printable(text.replace("\r\n", "\n").expandtabs(4)).strip("\n"))
