"""A lock on a run folder, so that two processes never train into it.

The lock is the operating system's (flock), which ends with the process that holds it, even after SIGKILL. The file also
names that process for the error.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from rlhf.core.console import warn
from rlhf.core.errors import UserError

LOCK = ".lock"
"""The lock's file in the run folder. It stays there; only a process that runs holds the lock itself."""
PATIENCE = 1.0
"""Seconds in which a lock may become free: `check_free` of another process holds it for an instant."""
_held: dict[Path, IO[str]] = {}


def lock(folder: Path) -> None:
    """Lock a folder for this process, until `unlock` or the end of the process. It may hold the lock already.

    Raises:
        UserError: Another process holds it; names its host and process id.
    """
    folder = folder.resolve()
    if folder in _held:
        if _is_there(folder, _held[folder]):
            return
        unlock(folder)  # a folder of that name was removed; an earlier run of this process, in a notebook, had it
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the lock is held)
    if not _locked(file, fcntl.LOCK_EX):
        file.close()
        raise _in_use(folder)
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
    _held[folder] = file


def unlock(folder: Path) -> None:
    """Give the lock back, if this process holds it."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def check_kept(folder: Path) -> None:
    """Refuse to write into a folder that was taken away after this process had locked it; others are not looked at.

    Raises:
        UserError: It was removed or moved, or another one has its name now.
    """
    file = _held.get(folder.resolve())
    if file is not None and not _is_there(folder, file):
        raise _taken_away(folder)


def taken_away() -> UserError | None:
    """The error of a folder that this process has locked and that is no longer there; None if all are."""
    return next((_taken_away(folder) for folder, file in _held.items() if not _is_there(folder, file)), None)


def _is_there(folder: Path, file: IO[str]) -> bool:
    """Whether the folder is the one that was locked, by its lock file: it is open, so its inode is not reused. If only
    that file was deleted, the folder counts as the same."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except OSError:
        return (folder / "run.json").exists()


def _taken_away(folder: Path) -> UserError:
    return UserError(
        f"run: {folder} was removed, moved or replaced while its run trained",
        "Metrics and checkpoints cannot be written, so the run ends here. A new folder of that name is not touched.",
        "If it was moved, move it back and repeat the command with --resume. If it was removed, start the run again, "
        "where nothing cleans up: run=...",
    )


def check_free(folder: Path) -> None:
    """Refuse a folder that another process has locked; creates nothing.

    Raises:
        UserError: Another process holds the lock; names its host and process id.
    """
    if in_use(folder, PATIENCE):
        raise _in_use(folder)


def in_use(folder: Path, patience: float = 0) -> bool:
    """Whether another process has locked a folder, for `patience` seconds from now on; creates nothing."""
    if folder.resolve() in _held or not (folder / LOCK).is_file():
        return False
    with open(folder / LOCK, encoding="utf-8") as file:
        return not _locked(file, fcntl.LOCK_SH, patience)


def _locked(file: IO[str], kind: int, patience: float = PATIENCE) -> bool:
    """Take the lock; False if another process keeps it."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        except OSError as error:
            warn(f"{file.name}: no lock ({error.strerror}); make sure that no other process uses this run folder")
            return True


def _in_use(folder: Path) -> UserError:
    try:
        found = json.loads((folder / LOCK).read_text("utf-8"))
        holder = f"process {int(found['pid'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "another process"
    return UserError(
        f"run: {folder} is in use by {holder}",
        "Two processes that train into one folder would mix their checkpoints and metrics.",
        "Wait until it ends or stop it, or name another folder: run=...",
    )
