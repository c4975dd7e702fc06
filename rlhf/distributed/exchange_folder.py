"""Private folders for files that two processes of a host exchange, in memory where the system allows it.

A folder is removed with the object. A process that is killed with SIGKILL leaves its folder behind; the next process
of the same user that makes one removes it. A lock of the operating system (flock), which ends with its process, shows
whether the owner still runs: process ids repeat, and differ between containers that share /dev/shm.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

MEMORY = Path("/dev/shm")
"""Files here never reach a disk; only on Linux."""
PREFIX = "rlhf-exchange-"
LOCK = ".lock"


class ExchangeFolder:
    """A new folder that only this user can read. `path` is valid until `close`, or until the object is gone."""

    def __init__(self) -> None:
        place = _place()
        remove_leftovers(place)
        new = Path(tempfile.mkdtemp(prefix=".rlhf-new-", dir=place))  # has its name once it is locked
        lock = open(new / LOCK, "w", encoding="utf-8")  # noqa: SIM115 (open for as long as the folder exists)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = new.rename(place / (PREFIX + new.name.removeprefix(".rlhf-new-")))
        self.close = weakref.finalize(self, _remove, self.path, lock)


def remove_leftovers(place: Path) -> None:
    """Remove this user's exchange folders whose process has ended."""
    for folder in place.glob(PREFIX + "*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with open(folder / LOCK, encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or another process removes it
            continue


def _place() -> Path:
    return MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())


def _remove(folder: Path, lock: IO[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
