"""Files and folders that appear under their name only when they are complete, even after a kill or a power cut.

Each is written under a hidden name in the same folder, flushed to the disk, and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError, blame


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. A rename may otherwise reach the disk before the content does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(path: Path) -> Path:
    """The hidden name under which `path` is written: `.NAME.partial` in the same folder."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden, empty folder to write into; leaving the block renames it to `path`.

    A folder that is already there is replaced. An exception in the block removes the hidden folder and leaves `path`
    as it was.

    Raises:
        UserError: Another process is writing the folder.
    """
    path = path.resolve()
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    partial.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked_folder(partial, path)
    try:
        if old.exists() and not path.exists():
            os.rename(old, path)  # an earlier process died between the two renames below
        for left in partial.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        for inner in (*partial.rglob("*"), partial):
            sync(inner)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():  # renamed rather than deleted, so that a kill never leaves half of it under the name
            os.rename(path, old)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _locked_folder(partial: Path, path: Path) -> int:
    """A handle of the hidden folder, made if it is missing, which keeps it locked until it is closed.

    The operating system ends the lock with the process, so a killed one leaves a folder that the next may take.
    """
    while True:
        partial.mkdir(exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process ended between the two lines
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            remedy = "Wait until it has ended, or name another folder."
            raise UserError(f"{path}: another process is writing it", remedy=remedy) from None
        except OSError:
            return handle  # a file system without locks
        with suppress(FileNotFoundError):  # the folder got its final name, or was removed, before it was locked
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return handle
        os.close(handle)


def short_names(paths: Iterable[Path], most: int = 6) -> str:
    """The first of some paths, in words, as seen from the working folder if they lie in it."""
    here, found = Path.cwd(), list(islice(paths, most + 1))
    shown = [str(one.relative_to(here) if one.is_relative_to(here) else one) for one in found[:most]]
    return ", ".join([*shown, *["..."] * (len(found) > most)])


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a hidden name, flush it, rename it."""
    partial = partial_path(path)
    partial.write_bytes(content)
    sync(partial)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file, one object a line. A kill may leave a half line at the end."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_writable(path: Path | None, option: str) -> None:
    """Make the folder of an output file, and refuse a file that cannot be written, before anything is loaded.

    Raises:
        UserError: It is a folder, its folder cannot be made, or it cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder", remedy="Name a file.")
    with blame(f"{option} {path}: its folder cannot be made", remedy="Name another file."):
        path.parent.mkdir(parents=True, exist_ok=True)
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"{option} {path}: {place} cannot be written", remedy="Name another file.")
