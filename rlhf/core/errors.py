"""The errors that end a command with a message, and nearest-match hints."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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

    Its text is what was reached, as a sentence: "Update 3 is in a checkpoint."
    """


SIGTERM_STATUS = 128 + 15
"""The exit status of a process that SIGTERM has ended, as shells report it."""


@contextmanager
def blame(what: str, why: str = "", remedy: str = "") -> Iterator[None]:
    """Turn what is raised in the block into an error that begins with `what`: an option, a config key, a file.

    Args:
        what: The place.
        why, remedy: Of an error that is made from a ValueError or an OSError; a UserError keeps its own.

    Raises:
        UserError: The block raised one of the three.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error.what}", error.why, error.remedy) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {error}", why, remedy) from None


def need_package(name: str, what: str, remedy: str) -> None:
    """Refuse `what`, such as `optimizer: adamw-8bit`, where the Python package that it needs is not installed.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs {name}, which is not installed", remedy=remedy)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``did you mean 'gae'? Valid: gae, rloo``, for an unknown name."""
    names = sorted(valid)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{match[0]}'? " if match else ""
    return f"{hint}Valid: {', '.join(names)}"
