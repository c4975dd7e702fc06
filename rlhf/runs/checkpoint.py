"""Checkpoints that are complete or absent: written under a hidden name, sealed with checksums, flushed, renamed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import xxhash

from rlhf import distributed
from rlhf.core.console import is_main, warn
from rlhf.core.errors import UserError
from rlhf.core.files import partial_path, whole_folder, write_json
from rlhf.core.lazy import torch
from rlhf.core.limits import read_json_object
from rlhf.runs.lock import check_kept

SEAL = "complete.json"
INVALID = 2**31
"""Stands for a seal that cannot be read, where ranks agree on the number of a damaged file."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `folder/step-00000100`, ...

    A checkpoint is complete if it has a seal, `complete.json`, and every file has the size and the checksum (XXH3, 128
    bits) that the seal records. The newest `keep` checkpoints stay on disk.
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

        Raises:
            UserError: The run folder was taken away.
        """
        check_kept(self.folder.parent)
        partial = partial_path(self.path(step))
        with whole_folder(self.path(step)) if is_main() else nullcontext():
            distributed.barrier()
            yield partial
            distributed.barrier()
            _seal(partial, step)
        if is_main():
            self._prune({step, protect})
        distributed.barrier()

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

    def newest(self, verify: bool = True) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint; None if none was written yet.

        Damaged ones are skipped with a warning.

        Args:
            verify: Compare checksums, which reads every file; else only sizes. Every rank calls it, and each reads its
                share of the files.

        Raises:
            UserError: There are checkpoints, and all are damaged.
        """
        first = None
        for step in reversed(self._steps()):
            fault = damage(self.path(step), verify)
            if fault is None:
                return step, self.path(step)
            warn(f"{self.path(step)}: {fault}; falling back to an older checkpoint")
            first = first or f"{self.path(step)}: {fault}"
        if first:
            raise UserError(
                first,
                "There is no older checkpoint that is complete, so the run cannot be continued.",
                "Put the file back from a copy, or start the run again with --overwrite.",
            )
        return None

    def check(self, step: int) -> Path:
        """The folder of a step's checkpoint, if it is complete. Every rank calls it.

        Raises:
            UserError: It is damaged; names the file.
        """
        fault = damage(self.path(step))
        if fault is not None:
            raise UserError(f"{self.path(step)}: {fault}", remedy="Put the file back from a copy, or train again.")
        return self.path(step)


def damage(checkpoint: Path, verify: bool = True) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete.

    Args:
        checkpoint: The folder.
        verify: Compare checksums too. Then every rank calls it, reads its share of the files, and gets the same answer.
    """
    try:
        seal = read_json_object(checkpoint / SEAL)
        sizes = {str(name): int(size) for name, size in dict(seal["files"]).items()}
        sums = dict(seal["xxh3_128"])
        int(seal["world_size"])
        names = sorted(sizes)
        bad = [i for i, name in enumerate(names) if _wrong_size(checkpoint / name, sizes[name])]
        if verify and not bad:
            bad = [i for i in _share(names) if sums.get(names[i]) != checksum(checkpoint / names[i])]
        fault = bad[0] if bad else -1
    except (OSError, ValueError, KeyError, TypeError):
        names, fault = [], INVALID
    if verify:
        fault = int(distributed.all_max(torch.tensor(fault, device=distributed.device())))
    if fault < 0:
        return None
    if fault >= len(names):
        return f"no valid {SEAL}, so it was not finished, or an earlier version wrote it"
    name = names[fault]
    return _wrong_size(checkpoint / name, sizes[name]) or f"{name} is damaged: its checksum differs from the seal's"


def _wrong_size(file: Path, size: int) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes, {size} were written"
    return None


def checksum(file: Path) -> str:
    """XXH3 of a file's content, 32 hex digits. It finds damage; it does not protect against forgery."""
    with open(file, "rb") as handle:  # read, since mapped pages would count as this process's memory
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()


def _share(names: Sequence[str]) -> list[int]:
    """Which of the files this rank hashes: those that it wrote, by the number at the end of their names; rank 0 also
    those without one. So they come from this host's memory and not over the network."""
    owners = [re.search(r"-(\d+)\.\w+$", name) for name in names]
    ranks = [int(owner[1]) % distributed.world_size() if owner else 0 for owner in owners]
    return [i for i, rank in enumerate(ranks) if rank == distributed.rank()]


def _seal(partial: Path, step: int) -> None:
    """Write the seal of a folder that all ranks have written to. Every rank calls it."""
    found = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    names: list[str] = distributed.from_main(found)
    sums = torch.zeros(len(names), 16, dtype=torch.int64, device=distributed.device())
    for i in _share(names):
        sums[i] = torch.tensor(list(bytes.fromhex(checksum(partial / names[i]))))
    rows = distributed.all_sum(sums).tolist()
    if is_main():
        sizes = {name: (partial / name).stat().st_size for name in names}
        checksums = {name: bytes(row).hex() for name, row in zip(names, rows)}
        seal = {"step": step, "world_size": distributed.world_size(), "files": sizes, "xxh3_128": checksums}
        write_json(partial / SEAL, seal)
