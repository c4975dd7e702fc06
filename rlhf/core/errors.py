"""The error class for users, and nearest-match hints."""

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


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'gae'? Valid: gae, rloo``, for an unknown name."""
    names = sorted(valid)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{match[0]}'? " if match else ""
    return f"{hint}Valid: {', '.join(names)}"
