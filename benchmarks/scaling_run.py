"""One PPO run of `benchmarks/scaling.py` on one or several processes: `python scaling_run.py SPEC.json RESULT`.

Counts the input of torch.distributed's collectives by phase, as the bytes that a ring sends from each rank. The
functions are wrapped before DeepSpeed is imported, so that its calls are counted too.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

WIRE: dict[str, tuple[str, float]] = {
    "all_reduce": ("tensor", 2),
    "reduce": ("tensor", 1),
    "broadcast": ("tensor", 1),
    "all_gather": ("tensor_list", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "reduce_scatter": ("input_list", 1),
    "reduce_scatter_tensor": ("input", 1),
}
"""Collective -> its argument that holds the whole tensor, and how often a ring of N ranks sends (N - 1) / N of it from
each rank: once to reduce-scatter, once to gather; an all-reduce does both (Patarasuk and Yuan 2009, section 3)."""


def loopback_bytes() -> int:
    """Bytes over the loopback device since it exists; in a private namespace all of them are ours."""
    found = re.search(r"lo:((?:\s+\d+)+)", Path("/proc/net/dev").read_text("ascii"))
    return int(found.group(1).split()[8]) if found else 0


def resident_peak() -> float:
    """Peak memory of this process since the last call, MB; since its start if the counter cannot be reset."""
    status = Path("/proc/self/status").read_text("ascii")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


class Traffic:
    """Bytes, processor seconds and peak memory by phase of the current update."""

    def __init__(self) -> None:
        self.phase = "other"
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.loopback: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        for name, (whole, times) in WIRE.items():
            setattr(dist, name, self._counted(getattr(dist, name), name, whole, times))

    def _counted(self, collective: Callable[..., Any], name: str, whole: str, times: float) -> Callable[..., Any]:
        signature = inspect.signature(collective)

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            tensors = given[whole] if isinstance(given[whole], list) else [given[whole]]
            ranks = dist.get_world_size(given.get("group"))
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.sent[self.phase] += times * size * (ranks - 1) / ranks
            self.calls[f"{self.phase} {name}"] += 1
            return collective(*args, **kwargs)

        return counted

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Start counting under this name."""
        resident_peak()
        self.phase, before, begun = phase, loopback_bytes(), time.process_time()
        yield
        self.peak[phase] = resident_peak()
        self.processor[phase] += time.process_time() - begun
        self.loopback[phase] += loopback_bytes() - before
        self.phase = "other"

    def take(self) -> dict[str, dict[str, float]]:
        """The counts since the last call."""
        names = ("sent", "calls", "loopback", "processor", "peak")
        found = {name: dict(getattr(self, name)) for name in names}
        for name in names:
            getattr(self, name).clear()
        return found


def main(spec: dict[str, Any], result: Path) -> None:
    """Train on the spec's config; every rank writes `result` with its rank appended."""
    traffic = Traffic()
    import stages.ppo
    from rlhf.config.load import check_config
    from rlhf.ppo.config import PPOConfig
    from stages.ppo import Clock

    class PhaseClock(Clock):
        @contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with traffic.during(phase), super().__call__(phase):
                yield

    stages.ppo.Clock = PhaseClock  # type: ignore[misc]
    config = check_config(PPOConfig, spec, "benchmark")
    stages.ppo.distributed.start(config.timeout_seconds, config.deepspeed is not None)
    base = resident_peak()
    stage = stages.ppo.PPO(config, resume=False, overwrite=True)
    load = resident_peak()
    update, updates = stage.update, []

    def counted(number: int) -> dict[str, float]:
        traffic.take()
        figures = update(number)
        updates.append({"figures": figures, **traffic.take()})
        return figures

    stage.update = counted  # type: ignore[method-assign]
    stage.train()
    peaks = {"load": load, **updates[-1]["peak"], "save": resident_peak()}
    found = {"updates": updates, "peak_mb": {phase: peak - base for phase, peak in peaks.items()}}
    result.with_name(f"{result.name}-{os.environ.get('RANK', '0')}").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
