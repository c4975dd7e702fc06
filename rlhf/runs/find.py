"""Which run folders lie below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlhf.core.errors import UserError
from rlhf.core.files import short_names

DEPTH = 4
"""Folders below the given one that are looked into: a pipeline's runs lie at most three deep."""
INSIDE = {"checkpoints", "model", "cache", "updates", "tensorboard", "adapter", "critic"}
"""What a run holds, besides runs."""


def run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders below a folder, itself included, by name; not those more than `depth` folders below it."""
    for path, folders, files in os.walk(folder):
        inside = "run.json" in files
        if inside:
            yield Path(path)
        deep = len(Path(path).relative_to(folder).parts) >= depth
        folders[:] = [] if deep else sorted(name for name in folders if not (inside and name in INSIDE))


def no_run(path: Path) -> UserError:
    """The error for a path that is no run folder, with the runs nearby that may be meant."""
    if not path.exists():
        what, remedy = "no such folder", "Check the path."
    elif not path.is_dir():
        what, remedy = "a file, not a run folder", "Name the folder that holds the run's run.json."
    else:
        what = "not a run folder (no run.json)"
        remedy = "Name the folder that a stage wrote; `rlhf runs FOLDER` lists the runs below a folder."
    return UserError(f"{path}: {what}", remedy=runs_nearby(path) or remedy)


def runs_nearby(path: Path) -> str:
    """What to do where a path is no run: name the run that it is a part of, one in it, or one next to it; or empty."""
    if not path.exists():
        there = next(above for above in path.absolute().parents if above.exists())
        near = short_names(run_folders(there, depth=1))  # a deeper search may take long
        return f"Check the path. Runs nearby: {near}" if near else ""
    above = next((one for one in path.absolute().parents if (one / "run.json").is_file()), None)
    if above is not None:
        return f"Name the run that it is a part of: {short_names([above])}"
    inside = short_names(run_folders(path)) if path.is_dir() else ""
    return f"Name a run in it: {inside}" if inside else ""
