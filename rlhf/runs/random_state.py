"""The global random generators of a process: seed them, save them, restore them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rlhf import distributed


def rng_state() -> dict[str, Any]:
    """The state of all global random generators of this process, loadable with `weights_only=True`."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, "int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore a state from `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_rng(folder: Path) -> None:
    """Write this rank's generators into a checkpoint; every rank calls it."""
    torch.save(rng_state(), folder / f"rng-{distributed.rank()}.pt")


def load_rng(folder: Path, seed: int, step: int) -> None:
    """Restore this rank's generators from a checkpoint.

    If another number of ranks wrote it, there is no state for each, so all are seeded from the run's seed and the step.
    Only dropout in adapters and specialists draws from them; the data's order and the sampler have their own streams.
    """
    if len(list(folder.glob("rng-*.pt"))) == distributed.world_size():
        set_rng_state(torch.load(folder / f"rng-{distributed.rank()}.pt", weights_only=True))
    else:
        seed_everything(seed + 7919 * step)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices, differently on each rank."""
    transformers.set_seed((seed + 1_000_003 * distributed.rank()) % 2**32)
