"""The command that started this process and the commit of its code, for provenance records."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path


def command_line() -> str:
    """The command line in shell syntax, such as `rlhf data split stories --seed 3`.

    `--out` with its value, `--overwrite` and `--json` are left out: they say where the record is, not what made it.

    Credentials in URLs are left out as well.

    `python -m stages.cli`, which starts the steps of a pipeline, is written `rlhf`. In a program that calls this
    library, the command line is that program's own.
    """
    program = Path(sys.argv[0])
    name = "rlhf" if program.parts[-2:] == ("stages", "cli.py") else program.name
    words, rest = [name], iter(sys.argv[1:])
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif word not in ("--json", "--overwrite") and not word.startswith("--out="):
            words.append(word)
    return shlex.join(map(without_credentials, words))


def without_credentials(text: str) -> str:
    """A text without the user names and passwords in its URLs: `http://me:secret@host` becomes `http://host`."""
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]*@", r"\1", text)


@functools.cache
def git_commit() -> str | None:
    """The git commit of the code, with '+changes' if files were changed; None outside a checkout.

    Asked once in a process, near the moment that it imported the code.
    """
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
