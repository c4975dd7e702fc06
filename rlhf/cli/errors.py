"""Errors become messages and exit statuses."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf import distributed
from rlhf.core.command_line import without_credentials
from rlhf.core.console import err, is_main
from rlhf.core.errors import UserError
from rlhf.distributed.launch import PARENT


def resume_line(command: str | None) -> str | None:
    """How to continue after Ctrl-C; None under a launcher or pipeline, which prints this itself."""
    if PARENT in os.environ:
        return None
    return f"Continue with: {command}" if command else "Continue with the same command and --resume."


@contextmanager
def exit_on_error(resume: str | None = None) -> Iterator[None]:
    """Turn exceptions into messages and exit statuses.

    A UserError is printed without a traceback and exits with status 2. Ctrl-C prints `resume` and exits with 130.
    Anything else keeps its traceback; on ranks other than 0 every line of it is prefixed with the rank.
    """
    try:
        yield
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main() and resume:
            err().print(f"\nInterrupted. {resume}", markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception:
        if is_main():
            raise
        print_lines(traceback.format_exc())
        sys.exit(1)


def print_error(error: UserError) -> None:
    """What is wrong, why, and what to do, each on its own line of standard error."""
    labels = (("error: ", error.what), ("  why: ", error.why), ("  fix: ", error.remedy))
    print_lines(without_credentials("\n".join(label + text for label, text in labels if text)), style="red")


def print_lines(text: str, style: str | None = None) -> None:
    """Print to standard error, each line prefixed with the rank unless this is rank 0."""
    prefix = "" if is_main() else f"[rank {distributed.rank()}] "
    for line in text.splitlines():
        err().print(prefix + line, style=style, markup=False, soft_wrap=True)
