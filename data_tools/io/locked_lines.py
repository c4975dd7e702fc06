"""A file of lines that one process at a time adds to, and of which a crash leaves whole lines."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from rlhf.core.errors import UserError
from rlhf.core.files import sync


class LockedLines:
    """A file that is open for adding lines, locked against other processes; a context manager.

    A line is written in one piece and is on the disk when `append` returns.

    Args:
        path: The file; it is made, with its folder, if it is not there.
        busy_remedy: What to do if another process holds the lock.

    Raises:
        UserError: It cannot be written, or another process holds it.
    """

    def __init__(self, path: Path, busy_remedy: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # __exit__ closes it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"--out {path}: another `rlhf data rank` is writing it", remedy=busy_remedy) from None
        except OSError as error:
            remedy = "Make the folder writable, or name another place with --out."
            raise UserError(f"--out {path}: cannot be written: {error}", remedy=remedy) from None
        sync(path.parent)

    def __enter__(self) -> LockedLines:
        return self

    def __exit__(self, *_: object) -> None:
        if not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)  # an empty file would be no dataset
        self._file.close()

    def read(self) -> bytes:
        """The whole content."""
        self._file.seek(0)
        return self._file.read()

    def append(self, line: bytes) -> None:
        """Add a line, which ends with a newline. If that fails, the file is as before.

        Raises:
            UserError: The disk is full, or the like.
        """
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            raise UserError(f"{self.path}: cannot be written: {error}", remedy="Free disk space.") from None

    def truncate(self, size: int) -> None:
        """Cut the file to this many bytes, on the disk."""
        self._file.truncate(size)
        os.fsync(self._file.fileno())
