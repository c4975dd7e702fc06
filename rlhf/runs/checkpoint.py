"""Checkpoints that are complete or absent: written under a hidden name, sealed, flushed, renamed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rlhf import distributed
from rlhf.core.console import is_main, warn
from rlhf.core.errors import UserError
from rlhf.core.files import partial_path, whole_folder, write_json
from rlhf.core.limits import read_json_object

SEAL = "complete.json"
SMALL = 2**16
"""Up to this size in bytes, the seal holds a file's SHA-256 too."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `folder/step-00000100`, ...

    A checkpoint is complete if it has a seal, `complete.json`, and every file has the size that the seal records, and
    small files also the hash. The newest `keep` checkpoints stay on disk.
    """

    folder: Path
    keep: int

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @contextmanager
    def write(self, step: int, protect: int | None = None) -> Iterator[Path]:
        """Yield a hidden folder for a checkpoint; leaving the block seals and renames it. Every rank calls it.

        Args:
            step: The step of the checkpoint.
            protect: A step whose checkpoint must not be deleted (the best so far).
        """
        partial = partial_path(self.path(step))
        with whole_folder(self.path(step)) if is_main() else nullcontext():
            distributed.barrier()
            yield partial
            distributed.barrier()
            if is_main():
                self._seal(partial, step)
        if is_main():
            self._prune({step, protect})
        distributed.barrier()

    def _seal(self, partial: Path, step: int) -> None:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
        hashes = {name: _sha256(partial / name) for name, size in sizes.items() if size <= SMALL}
        seal = {"step": step, "world_size": distributed.world_size(), "files": sizes, "sha256": hashes}
        write_json(partial / SEAL, seal)

    def _prune(self, protect: set[int | None]) -> None:
        steps = self._steps()
        for step in steps[: max(0, len(steps) - self.keep)]:
            if step not in protect:
                shutil.rmtree(self.path(step))
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.glob("step-*")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def newest(self, processes: int | None = None) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint. Damaged ones are skipped with a warning.

        Args:
            processes: How many are to continue from it; this run's when left out.

        Raises:
            UserError: It was written by another number of processes.
        """
        for step in reversed(self._steps()):
            fault = damage(self.path(step))
            if fault is None:
                _check_processes(self.path(step), processes or distributed.world_size())
                return step, self.path(step)
            warn(f"{self.path(step)}: {fault}; falling back to an older checkpoint")
        return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete."""
    try:
        seal = read_json_object(checkpoint / SEAL)
        files, hashes = dict(seal["files"]), dict(seal.get("sha256", {}))
        int(seal["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"no valid {SEAL}, so it was not finished"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if name in hashes and _sha256(file) != hashes[name]:
            return f"{name} is damaged: its SHA-256 differs from the seal"
    return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_processes(checkpoint: Path, processes: int) -> None:
    wrote = int(read_json_object(checkpoint / SEAL)["world_size"])
    if wrote != processes:
        raise UserError(
            f"{checkpoint}: written by {wrote} processes, this run has {processes}",
            "Each process keeps its part of the optimizer state and its own random state.",
            f"Resume with --num-processes {wrote}.",
        )
