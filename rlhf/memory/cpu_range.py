"""The range in which the peak memory of a process without a GPU lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.distributed.deepspeed_json import deepspeed_settings

if TYPE_CHECKING:
    from rlhf.memory.predict import Prediction

UNKNOWN_CODE = {False: 150e6, True: 200e6}
"""Bytes of a process on a CPU, at most, for code and tables that libraries load at first use; with DeepSpeed (True)."""
KEPT_BY_MALLOC = 1.7
"""Resident memory over live memory, at most, with glibc 2.36: it keeps what was freed.

It asks for more than a block's size to align it, so that a block as large as a freed one does not fit in its place.
"""


@dataclass(frozen=True)
class CpuRange:
    """Bytes of a process above what was resident before its models were loaded."""

    low: float
    high: float
    tensors: Prediction
    """The prediction for the longest batches, without what glibc keeps and libraries load."""

    def __str__(self) -> str:
        return f"{size_in_words(self.low)} to {size_in_words(self.high)} ({self.tensors.peak_phase})"


def on_cpu(
    config: Any,
    bfloat16: bool,
    processes: int,
    longest: int | None,
    mean: float | None,
    candidates: int,
    base: str | None = None,
) -> CpuRange:
    """The range for a process of a run.

    What a process on a CPU holds besides tensors differs by more than the tensors of a small model: see UNKNOWN_CODE
    and KEPT_BY_MALLOC. The low end has batches of mean length (of completions: half of the longest) and neither of the
    two. The high end has the longest batches and both, and keeps the activations that `gradient_checkpointing` frees:
    while a layer's tensors are freed its input stays, and glibc does not use the pieces between such inputs again.

    Args:
        config: The stage's config.
        bfloat16: Whether the compute dtype is bfloat16.
        processes: Number of processes.
        longest: Tokens of the longest prompt (PPO) or row; what the config allows if None.
        mean: The same of the mean one.
        candidates: Most answers of a ranking.
        base: Folder with the config.json of models whose runs do not exist yet.
    """
    from rlhf.memory.predict import PROCESS

    tensors = high = predicted(config, bfloat16, processes, longest, candidates, base=base)
    if config.gradient_checkpointing:
        kept = config.model_copy(update={"gradient_checkpointing": False})
        high = predicted(kept, bfloat16, processes, longest, candidates, base=base)
    typical = config
    if hasattr(config, "rollout"):
        half = {"max_new_tokens": max(1, config.rollout.max_new_tokens // 2)}
        typical = config.model_copy(update={"rollout": config.rollout.model_copy(update=half)})
    shorter = longest if mean is None else max(1, round(mean))
    low = predicted(typical, bfloat16, processes, shorter, 2, base=base)
    least, most = (max(one.total - one[PROCESS] for one in found.phases.values()) for found in (low, high))
    code = UNKNOWN_CODE[config.deepspeed is not None or processes > 1]
    return CpuRange(least, KEPT_BY_MALLOC * most + code, tensors)


def predicted(
    config: Any,
    bfloat16: bool,
    processes: int,
    longest: int | None,
    candidates: int,
    gpu: bool = False,
    base: str | None = None,
) -> Prediction:
    """The prediction for batches of one length. The arguments are those of `on_cpu`."""
    from rlhf.memory.predict import ZeroLayout, predict
    from rlhf.memory.traced_model import TracedModel
    from rlhf.memory.workload import batch_shape, limit_of

    settings = deepspeed_settings(config.deepspeed, processes)
    work = batch_shape(config, limit_of(config, base), processes, longest, candidates)
    traced = TracedModel(config, work, bfloat16, deepspeed=settings is not None, base=base)
    return predict(traced, ZeroLayout.of(settings), processes, gpu)


def size_in_words(size: float) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
