"""The errors that end a command with a message, and nearest-match hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Printed without a traceback; the process exits with status 2.

    Args:
        what: What is wrong, with the value and its place (file:line or config key).
        why: Why that is a problem.
        remedy: What to do about it.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__("\n".join(part for part in (what, why, remedy) if part))


class Terminated(BaseException):
    """SIGTERM has ended a run, as Ctrl-C does with KeyboardInterrupt; the process exits with status 143.

    Args:
        state: What was reached, as a sentence: "Update 3 is in a checkpoint."
    """

    def __init__(self, state: str = "") -> None:
        self.state = state
        super().__init__(state)


SIGTERM_STATUS = 128 + 15
"""The exit status of a process that SIGTERM has ended, as shells report it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'gae'? Valid: gae, rloo``, for an unknown name."""
    names = sorted(valid)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{match[0]}'? " if match else ""
    return f"{hint}Valid: {', '.join(names)}"
