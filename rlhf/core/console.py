"""Console output: tables, one line per step, progress bars with rate and time left. Only rank 0 prints."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


def is_main() -> bool:
    """True on rank 0, the process that prints and writes shared files."""
    return int(os.environ.get("RANK", "0")) == 0


class _Console(Console):
    """A console for which every text is data: brackets are not markup, and control characters never reach it."""

    def __init__(self, file: TextIO, quiet: bool = False) -> None:
        width = None if file.isatty() else 110
        super().__init__(file=file, width=width, highlight=False, markup=False, emoji=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, and every cell and title of a table, is rendered here."""
        return super().render_str(printable(text), **options)


def out() -> Console:
    """The console for results, on standard output (110 columns if that is not a terminal)."""
    return _Console(sys.stdout, quiet=not is_main())


def err() -> Console:
    """The console for errors, on standard error; every rank prints there."""
    return _Console(sys.stderr)


def say(text: str, style: str | None = None) -> None:
    """Print one line on the main process."""
    out().print(text, style=style, soft_wrap=True)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output, on the main process.

    Characters that a terminal could obey are written as JSON escapes.
    """
    if is_main():
        text = json.dumps(value, ensure_ascii=False)
        print("".join(c if _is_safe(c) else json.dumps(c)[1:-1] for c in text), flush=True)


def warn(text: str) -> None:
    """Print a warning on the main process."""
    if is_main():
        err().print(f"warning: {text}", style="yellow", soft_wrap=True)


def format_number(value: Any, digits: int = 4) -> str:
    """A number with 4 significant digits and thousands separators; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def printable(text: str) -> str:
    """Text that is safe to print: control characters (such as escape sequences) become a replacement character.

    So do characters that turn the direction of writing, and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    unsafe = [c for c in set(text) if not _is_safe(c) and c not in "\n\t"]
    return text.translate(dict.fromkeys(map(ord, unsafe), "\N{REPLACEMENT CHARACTER}"))


def _is_safe(letter: str) -> bool:
    """Whether a character is shown. Spaces of any width are, and the joiners that Persian and emoji need."""
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"


_JOINERS = "\u200c\u200d"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are right-aligned. Words are broken only where they do not fit otherwise."""
    rows = [list(row) for row in rows]
    cells = [[format_number(cell) for cell in row] for row in rows]
    console, view = out(), Table(title=title, title_justify="left", title_style="bold")
    widths = _column_widths([columns, *cells], console.width - 1 - 3 * len(columns))
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(r[index], (int, float, type(None))) for r in rows)
        view.add_column(column, justify="right" if numeric else "left", overflow="fold", width=widths[index])
    for row in cells:
        view.add_row(*row)
    console.print(view)
    sys.stdout.flush()


LONG_WORD = 34
"""Characters of a word from which it may be broken in a narrow table: a path, a hash."""


def _column_widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of a table's columns, all together at most `room` where each can have one character.

    Rich would make the widest columns narrower until they fit, and so break words while other columns keep spaces.
    """
    by_column = [[printable(cell) for cell in column] for column in zip(*rows)]
    whole = [max(1, *(cell_len(line) for cell in column for line in cell.split("\n"))) for column in by_column]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in by_column]
    words = [min(word, LONG_WORD) for word in words]
    least, most = (words, whole) if sum(words) <= room else ([1] * len(words), words)
    widths, level = most, max(most, default=0)
    while sum(widths) > room and level > 1:
        level -= 1
        widths = [min(high, max(low, level)) for low, high in zip(least, most)]
    return widths


def _bar(console: Console, *columns: TextColumn) -> Progress:
    """A bar that vanishes at the end, shown only on a terminal, by the main process."""
    first = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    shown = is_main() and console.is_terminal
    return Progress(*first, *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown)


@contextmanager
def progress(what: str, total: int | None, unit: str = "it") -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left that vanishes at the end. Shown only on a terminal, by the main process.

    Args:
        what: What is done.
        total: Number of items; None if unknown.
        unit: What the rate counts.

    Yields:
        `advance(items=1, work=None)`: `items` more are done, which held `work` units (as many as items by default).
    """
    with _bar(err(), TextColumn("{task.fields[rate]}", markup=False)) as bar:
        task, started, done = bar.add_task(what, total=total, rate=""), time.monotonic(), 0

        def advance(items: int = 1, work: int | None = None) -> None:
            nonlocal done
            done += items if work is None else work
            bar.update(task, advance=items, rate=f"{done / max(1e-9, time.monotonic() - started):,.0f} {unit}/s")

        yield advance


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar; see `progress`."""
    with progress(what, total if total is not None else getattr(items, "__len__", lambda: None)(), unit) as advance:
        for item in items:
            yield item
            advance()


class StepBar:
    """One line per step, with a progress bar below it on a terminal. Only rank 0 prints."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.total, self._digits = total, len(str(total))
        self._pace: float | None = None
        self._bar = _bar(out())
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._bar.start()

    def step(self, done: int, text: str, seconds: float) -> None:
        """Print the line of step `done`, which took `seconds`."""
        self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds
        left = int(self._pace * (self.total - done))
        clock = f"{left // 60 % 60:02d}:{left % 60:02d}"
        clock = f"{left // 3600}:{clock}" if left >= 3600 else clock
        self.note(f"{done:>{self._digits}}/{self.total}  {text}  {seconds:.2f} s  ETA {clock}")
        self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, soft_wrap=True)
        sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()
