"""The measured and the predicted peak memory of this process, printed at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf import distributed
from rlhf.core.console import is_main, say
from rlhf.distributed.deepspeed_json import read_deepspeed
from rlhf.models.load import compute_dtype

if TYPE_CHECKING:
    from rlhf.memory.predict import Prediction

STATUS = Path("/proc/self/status")
UNKNOWN_CODE = {False: 150e6, True: 200e6}
"""Bytes of a process on a CPU, at most, for code and tables that libraries load at first use; with DeepSpeed (True)."""
KEPT_BY_MALLOC = 1.4
"""Resident memory over live memory, at most: glibc keeps what was freed."""


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
        parts = [] if measured is None else [f"measured {_gb(measured)}"]
        try:
            parts.insert(0, f"predicted {_predicted(config, longest, mean, candidates)}")
        except Exception:  # some model families do not run on fake tensors
            parts.insert(0, "not predicted for this model")
        say(f"Peak memory of a process: {', '.join(parts)}")


def _predicted(config: Any, longest: int | None, mean: float | None, candidates: int) -> str:
    """The prediction in words: a number for a GPU, a range for a CPU.

    What a process on a CPU holds besides tensors differs by more than the tensors of a small model: see UNKNOWN_CODE
    and KEPT_BY_MALLOC. The low end has batches of mean length (of completions: half of the longest) and neither of the
    two; the high end has the longest batches and both.
    """
    from rlhf.memory.predict import PROCESS

    high = _prediction(config, longest, candidates)
    if torch.cuda.is_available():
        return f"{_gb(high.peak)} ({high.peak_phase})"
    typical = config
    if hasattr(config, "rollout"):
        half = {"max_new_tokens": max(1, config.rollout.max_new_tokens // 2)}
        typical = config.model_copy(update={"rollout": config.rollout.model_copy(update=half)})
    low = _prediction(typical, longest if mean is None else max(1, round(mean)), 2)
    least, most = (max(one.total - one.parts[PROCESS] for one in found.phases.values()) for found in (low, high))
    code = UNKNOWN_CODE[config.deepspeed is not None or distributed.world_size() > 1]
    return f"{_gb(least)} to {_gb(KEPT_BY_MALLOC * most + code)} ({high.peak_phase})"


def _prediction(config: Any, longest: int | None, candidates: int) -> Prediction:
    from rlhf.memory.predict import ZeroLayout, predict
    from rlhf.memory.traced_model import TracedModel
    from rlhf.memory.workload import batch_shape, limit_of

    settings = read_deepspeed(config.deepspeed) if config.deepspeed else None
    if settings is None and distributed.world_size() > 1:
        settings = {"zero_optimization": {"stage": 0}}
    bfloat16, gpu = compute_dtype(config.precision) == torch.bfloat16, torch.cuda.is_available()
    work = batch_shape(config, limit_of(config), distributed.world_size(), longest, candidates)
    traced = TracedModel(config, work, bfloat16, deepspeed=settings is not None)
    return predict(traced, ZeroLayout.of(settings), distributed.world_size(), gpu)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest), bytes; 0 where there is no /proc."""
    found = re.search(rf"{field}:\s+(\d+)", STATUS.read_text("ascii")) if STATUS.is_file() else None
    return int(found[1]) * 1024.0 if found else 0.0
