"""Files and folders that appear under their name only when they are complete, even after a kill or a power cut.

Each is written under a hidden name in the same folder, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """
    path = path.resolve()
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)  # an earlier process died between the two renames below
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for inner in (*partial.rglob("*"), partial):
            sync(inner)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():  # renamed rather than deleted, so that a kill never leaves half of it under the name
            os.rename(path, old)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
