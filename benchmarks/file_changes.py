"""Through how many files does one PPO update walk, and how often does the file change from one call to the next?

    python benchmarks/file_changes.py            the second update of a tiny Llama: 8 episodes of 12 tokens, 2 layers
    python benchmarks/file_changes.py --walk     also each file in turn, with the functions that are called in it

Every call of a function of this project counts, comprehensions included; what torch and transformers call does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
OURS = tuple(str(REPOSITORY / root) for root in ("rlhf", "stages"))
SIZES = {
    "2 epochs x 2 minibatches x 2 micro-batches": {},
    "2 epochs x 2 minibatches": {"batch__micro_batch_tokens": 100_000},
    "1 epoch, 1 minibatch": {
        "batch__micro_batch_tokens": 100_000, "batch__epochs": 1, "batch__minibatches": 1,
    },
}  # fmt: skip


def calls_of(work: Callable[[], Any]) -> list[tuple[str, str]]:
    """(File, function) of each call of a function of this project, in their order."""
    found: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            found.append((str(Path(code.co_filename).relative_to(REPOSITORY)), code.co_name))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walk", action="store_true", help="print the files in turn")
    walk = parser.parse_args().walk
    import ppo_runs
    import tiny
    import torch

    from stages.ppo import PPO

    torch.set_num_threads(1)
    rows = []
    for size, changes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            prompts = tiny.write_demonstrations(Path(folder) / "prompts", 24, held_out=4)
            stage = PPO(ppo_runs.config(Path(folder) / "run", prompts, **changes), resume=False, overwrite=False)
            stage.update(0)
            calls = calls_of(lambda stage=stage: stage.update(1))
        turns = [(file, [name for _, name in part]) for file, part in groupby(calls, key=lambda call: call[0])]
        rows.append(f"| {size} | {len({file for file, _ in turns})} | {len(set(calls))} | {len(turns) - 1} |")
        for file, names in turns if walk else ():
            print(f"{file}: {' '.join(names)}")
    print(
        "| an update of 8 episodes | files | functions | changes of file |\n| --- | --- | --- | --- |", *rows, sep="\n"
    )


if __name__ == "__main__":
    main()
