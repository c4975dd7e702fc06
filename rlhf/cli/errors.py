"""Errors become messages and exit statuses."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf import distributed
from rlhf.core.command_line import without_credentials
from rlhf.core.console import err, is_main
from rlhf.core.errors import SIGTERM_STATUS, Terminated, UserError
from rlhf.distributed.launch import PARENT
from rlhf.runs.lock import taken_away


def resume_line(command: str | None) -> str | None:
    """How to continue after Ctrl-C; None under a launcher or pipeline, which prints this itself."""
    if PARENT in os.environ:
        return None
    return f"Continue with: {command}" if command else "Continue with the same command and --resume."


@contextmanager
def exit_on_error(resume: str | None = None) -> Iterator[None]:
    """Turn exceptions into messages and exit statuses.

    A UserError is printed without a traceback and exits with status 2, and so are a full disk and a run folder that
    was taken away. Ctrl-C prints `resume` and exits with 130; SIGTERM, which a stage answers with a checkpoint, does
    the same with 143. Anything else keeps its traceback; on ranks other than 0 every line of it is prefixed with the
    rank.
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
    except Terminated as stopped:
        reached = str(stopped)
        if is_main() and (resume or reached):
            # a launcher or pipeline prints how to resume itself
            words = ("\nEnded by SIGTERM.", reached, resume) if resume else (reached,)
            err().print(" ".join(filter(None, words)), markup=False, soft_wrap=True)
        sys.exit(SIGTERM_STATUS)
    except Exception as error:
        if (known := full_disk(error) or taken_away()) is not None:
            print_error(known)
            sys.exit(2)
        if is_main():
            raise
        print_lines(traceback.format_exc())
        sys.exit(1)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = (
    "No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed writing",
    " . unexpected pos ",
)  # fmt: skip
"""What torch and safetensors say in their own exceptions, which carry no error number."""


def full_disk(error: BaseException) -> UserError | None:
    """The error for the user if an exception, or one that led to it, comes from a full disk; None for any other."""
    found: BaseException | None = error
    while found is not None:
        by_number = isinstance(found, OSError) and found.errno in FULL
        if by_number or any(text in str(found) for text in FULL_TEXTS):
            file = getattr(found, "filename", None) or "a file"
            return UserError(
                f"{file}: cannot be written: the disk is full, or a quota or limit of file sizes is reached",
                "Nothing that was complete is lost: checkpoints, results and datasets appear only when they are whole.",
                "Free disk space and repeat the command; a training run continues with --resume.",
            )
        found = found.__cause__ or found.__context__
    return None


def print_error(error: UserError) -> None:
    """What is wrong, why, and what to do, each on its own line of standard error."""
    labels = (("error: ", error.what), ("  why: ", error.why), ("  fix: ", error.remedy))
    print_lines(without_credentials("\n".join(label + text for label, text in labels if text)), style="red")


def print_lines(text: str, style: str | None = None) -> None:
    """Print to standard error, each line prefixed with the rank unless this is rank 0."""
    prefix = "" if is_main() else f"[rank {distributed.rank()}] "
    for line in text.splitlines():
        err().print(prefix + line, style=style, markup=False, soft_wrap=True)
