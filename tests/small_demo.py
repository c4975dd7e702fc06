"""A small demo: `python tests/small_demo.py OUT` makes it in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stages.demo import Demo, Size

ROOT = Path(__file__).resolve().parents[1]
SMALL = Size(
    documents=2000, base_steps=60, demonstrated=64, ranked=64, held_out=8, tested=24,
    overrides={
        "sft": ("batch.epochs=1",),
        "reward": ("batch.epochs=1",),
        "ppo": ("updates=6", "rollout.prompts_per_update=16", "checkpoints.every=2", "eval.every=3", "eval.prompts=8"),
    },
)  # fmt: skip


def start(out: Path) -> subprocess.Popen[str]:
    """Make it in a process that a test may kill."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, __file__, str(out)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    Demo(Path(sys.argv[1]), 5, SMALL).run()
