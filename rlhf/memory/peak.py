"""The measured and the predicted peak memory of this process, printed at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from rlhf import distributed
from rlhf.core.console import is_main, say
from rlhf.memory.cpu_range import on_cpu, predicted, size_in_words
from rlhf.models.load import compute_dtype

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Measures from its creation on: memory that torch allocated on the GPU, or resident memory without a GPU."""

    def __init__(self) -> None:
        self._base = 0.0 if torch.cuda.is_available() else _resident("VmRSS")

    def measured(self) -> float | None:
        """Bytes; None if the system does not report it."""
        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_allocated())
        highest = _resident("VmHWM")
        return highest - self._base if highest else None

    def report_rows(self, config: Any, rows: Any) -> None:
        """See `report`; for training rows of whole rankings."""
        lengths = rows["length"]
        self.report(config, max(lengths), sum(lengths) / len(lengths), max(map(len, rows["ranks"])))

    def report(self, config: Any, longest: int | None = None, mean: float | None = None, candidates: int = 2) -> None:
        """Print both in a line. A failed prediction is left out and never ends a run.

        Args:
            config: The stage's config.
            longest: Tokens of the longest prompt (PPO) or row.
            mean: The same of the mean one.
            candidates: Most answers of a ranking.
        """
        if not is_main():
            return
        measured = self.measured()
        parts = [] if measured is None else [f"measured {size_in_words(measured)}"]
        try:
            parts.insert(0, f"predicted {_predicted(config, longest, mean, candidates)}")
        except Exception:  # some model families do not run on fake tensors
            parts.insert(0, "not predicted for this model")
        say(f"Peak memory of a process: {', '.join(parts)}")


def _predicted(config: Any, longest: int | None, mean: float | None, candidates: int) -> str:
    """The prediction in words: a number for a GPU, a range for a CPU."""
    processes = distributed.world_size()
    bfloat16 = compute_dtype(config.precision) == torch.bfloat16
    if not torch.cuda.is_available():
        return str(on_cpu(config, bfloat16, processes, longest, mean, candidates))
    found = predicted(config, bfloat16, processes, longest, candidates, gpu=True)
    return f"{size_in_words(found.peak)} ({found.peak_phase})"


def _resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest), bytes; 0 where there is no /proc."""
    found = re.search(rf"{field}:\s+(\d+)", STATUS.read_text("ascii")) if STATUS.is_file() else None
    return int(found[1]) * 1024.0 if found else 0.0
