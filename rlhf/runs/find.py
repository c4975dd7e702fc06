"""Which run folders lie below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

DEPTH = 4
"""Folders below the given one that are looked into: a pipeline's runs lie at most three deep."""
INSIDE = {"checkpoints", "model", "cache", "updates", "tensorboard", "adapter", "critic"}
"""What a run holds, besides runs."""


def run_folders(folder: Path) -> Iterator[Path]:
    """The run folders below a folder, itself included, by name."""
    for path, folders, files in os.walk(folder):
        inside = "run.json" in files
        if inside:
            yield Path(path)
        deep = len(Path(path).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not (inside and name in INSIDE))
