"""A small demo, made in a folder by a process that a test may kill."""

from __future__ import annotations

from pathlib import Path

import forked
import tiny

from stages.demo import Demo, Size

SMALL = Size(
    documents=2000, base_steps=60, demonstrated=64, ranked=64, held_out=8, tested=24,
    overrides={
        "sft": ("batch.epochs=1",),
        "reward": ("batch.epochs=1",),
        "ppo": ("updates=6", "rollout.prompts_per_update=16", "checkpoints.every=2", "eval.every=3", "eval.prompts=8"),
    },
)  # fmt: skip


def make(out: str) -> None:
    """Make it, or go on with it."""
    Demo(Path(out), 5, SMALL).run()


def start(out: Path) -> forked.Ranks:
    """The same in a forked process."""
    return tiny.start(1, "import sys, small_demo; small_demo.make(sys.argv[1])", str(out))
