"""Peak memory of a run before it runs: by phase, by part, for each process, however DeepSpeed divides the states.

What passes hold comes from `rlhf.memory.footprint`, which runs the real modules on imagined tensors. States are
arithmetic: weights, gradients, AdamW's two moments and float32 masters, divided as each ZeRO stage does, and
DeepSpeed's buffers (deepspeed 0.19, runtime/zero/stage_1_and_2.py and stage3.py, runtime/bf16_optimizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.memory.footprint import TracedModel
from rlhf.memory.tracer import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, OPTIMIZER, MemorySnapshot
from rlhf.ppo.config import PPOConfig

WEIGHTS, BUFFERS, PROCESS = "weights", "DeepSpeed's buffers", "libraries at work"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, CACHE, BUFFERS, PROCESS)
LIBRARIES, LIBRARIES_DIVIDED = 40e6, 90e6
"""What a process on a CPU takes beside tensors once it works, measured: code and tables that are read when first used;
gloo's and DeepSpeed's beside."""
PHASES = ("load", "rollout", "scoring", "update", "checkpoint")


@dataclass(frozen=True)
class ZeroLayout:
    """What DeepSpeed divides over the processes, and what lies in the host's memory; sizes in elements."""

    stage: int | None = None
    """ZeRO stage; None for plain torch in one process."""
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    bucket: float = 5e8
    """Gradients that are reduced together."""
    buckets: int = 1
    """How many of them are filled in turn."""
    live: float = 1e9
    """Weights that stage 3 keeps gathered at most."""

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> ZeroLayout:
        """From a DeepSpeed JSON; plain torch without one."""
        if settings is None:
            return cls()
        zero = settings.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        number = lambda key, default: default if zero.get(key, "auto") == "auto" else float(zero[key])  # noqa: E731
        return cls(
            stage,
            "offload_optimizer" in zero,
            "offload_param" in zero,
            number("reduce_bucket_size", 5e8),
            2 if zero.get("overlap_comm", stage == 3) is True and stage < 3 else 1,
            number("stage3_max_live_parameters", 1e9) + number("stage3_prefetch_bucket_size", 5e7),
        )


@dataclass(frozen=True)
class Prediction:
    """Bytes of one process."""

    phases: dict[str, MemorySnapshot]
    """Phase -> what its highest moment holds, on the GPU (in the host's memory, where there is none)."""
    host: float
    """The most that it holds in the host's memory, where there is a GPU beside it."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> float:
        return self.phases[self.peak_phase].total


@dataclass(frozen=True)
class _Counts:
    """Numbers of weights."""

    engine: float
    trained: float
    group: float
    """Trained ones of the largest optimizer group."""
    policy: float
    frozen: float
    """Bytes of the models beside the engine."""
    engines: tuple[float, ...]
    """Of each engine under stage 3: the trained models' and one for each frozen model."""


def _counts(passes: TracedModel) -> _Counts:
    sizes = list(zip(passes.roles, passes.sizes))
    engine = [size for role, size in sizes if role.tuning is not None]
    frozen = [size for role, size in sizes if role.tuning is None]
    return _Counts(
        sum(s.total for s in engine), sum(s.trained for s in engine), max(s.trained for s in engine),
        sizes[0][1].total, sum(s.held for s in frozen), (sum(s.total for s in engine), *(s.total for s in frozen)),
    )  # fmt: skip


def _quantized_share(passes: TracedModel) -> float:
    """What a frozen weight of the engine takes beside one of 2 bytes: about a quarter in 4 bits."""
    picks = [role.tuning for role in passes.roles if role.tuning is not None]
    return 0.28 if any(pick.row.traits["quantized"] for pick in picks) else 1.0


def predict(passes: TracedModel, division: ZeroLayout, processes: int, gpu: bool) -> Prediction:
    """The peaks of a run on so many processes."""
    count = _counts(passes)
    width = passes.weights.itemsize
    states = _plain(passes, count) if division.stage is None else _divided(passes, count, division, processes, gpu)
    states.weights += count.frozen / (processes if division.stage == 3 else 1)
    beside = {} if gpu else {PROCESS: LIBRARIES if division.stage is None else LIBRARIES_DIVIDED}
    kept = {GRADIENTS: states.gradients} if division.stage == 3 else {}  # and its buffers, once they are in use
    phases = {
        "load": MemorySnapshot(beside | kept | {WEIGHTS: states.weights + states.load, OPTIMIZER: states.masters})
    }
    held = beside | kept | {WEIGHTS: states.weights, OPTIMIZER: states.optimizer}
    held |= {BUFFERS: states.buffers} if division.stage == 3 else {}
    # Stage 3 gathers the weights that a pass needs, of one engine after the other where several are asked.
    gathered = [min(size, states.live) * width for size in count.engines]
    if isinstance(passes.config, PPOConfig):
        whole = count.policy * width if division.stage == 3 else 0.0
        if passes.autocast:  # its frozen weights, rounded while it samples
            whole += passes.compute.itemsize * (passes.sizes[0].total - passes.sizes[0].trained)
        phases["rollout"] = _sum(
            held | {WEIGHTS: held[WEIGHTS] + whole}, max(passes.rollout.values(), key=lambda moment: moment.total)
        )
    phases["scoring"] = _sum(held | {WEIGHTS: states.weights + sum(gathered)}, passes.scoring)
    learning = held | {WEIGHTS: states.weights + gathered[0]}
    phases["update"] = _update(passes, states, division, learning, lazily=not gpu)
    merged = 0.0 if gpu else count.policy * width
    phases["checkpoint"] = MemorySnapshot(held | {WEIGHTS: held[WEIGHTS] + merged})
    return Prediction(phases, states.host + 4 * count.engine if gpu else 0.0)


@dataclass
class _States:
    """Bytes that lie there between the passes, and what comes on top of them in an update."""

    weights: float
    optimizer: float
    gradients: float
    masters: float = 0.0
    """The part of `optimizer` that is made with the engine; the moments come with the first step."""
    load: float = 0.0
    """On top while the engine is made."""
    buffers: float = 0.0
    step: float = 0.0
    """Gradients in AdamW's dtype."""
    host: float = 0.0
    live: float = 0.0
    """Stage 3: elements that an engine keeps gathered at most."""


def _plain(passes: TracedModel, count: _Counts) -> _States:
    share = _quantized_share(passes)
    width = passes.compute.itemsize if passes.shared else 4  # of the frozen ones
    weights = (width if share == 1.0 else 2 * share) * (count.engine - count.trained) + 4 * count.trained
    return _States(weights, 8 * count.trained, 4 * count.trained)


def _divided(passes: TracedModel, count: _Counts, division: ZeroLayout, processes: int, gpu: bool) -> _States:
    """States under DeepSpeed. Its offload leaves on the GPU what a pass needs."""
    n, width, stage = processes, passes.weights.itemsize, division.stage or 0
    mixed = width < 4
    bucket = division.bucket if gpu else min(division.bucket, count.trained)  # untouched pages are not resident
    if stage == 0:
        # float32: the module as it is, and a flat copy of a bucket; bfloat16: BF16_Optimizer, masters divided
        buffers = min(division.bucket, count.trained) * 4.0
        if not mixed:
            return _States(4 * count.engine, 8 * count.trained, 4 * count.trained, buffers=buffers)
        return _States(
            2 * count.engine, 12 * count.trained / n, 6 * count.trained, 4 * count.trained / n, 2 * count.group,
        )  # fmt: skip
    if stage < 3:
        states = _States(
            width * count.engine,
            12 * count.trained / n,
            width * (count.trained / n if stage == 2 else count.trained),
            masters=4 * count.trained / n,
            buffers=bucket * width * (division.buckets if gpu else 1),
            step=4 * count.group / n,
        )
    else:
        states = _States(
            width * count.engine / n,
            12 * count.trained / n,
            width * count.trained / n,
            masters=4 * count.trained / n,
            # its optimizer's first gradients, of a whole sub-group; without a GPU, the weights before they are divided
            load=4 * min(count.trained, 1e9) + (0 if gpu else 4 * count.engine * (1 - 1 / n)),
            buffers=bucket * width,
            step=4 * min(count.trained, 1e9) / n if mixed else 0.0,
            live=division.live,
        )
    if gpu and division.optimizer_on_host:
        states.host += states.optimizer + 4 * count.trained / n
        states.optimizer = states.masters = states.load = 0.0
        states.step, states.gradients = 0.0, 0.0 if stage == 3 else states.gradients
    if gpu and division.weights_on_host and stage == 3:
        states.host += states.weights
        states.weights = 0.0
    return states


def _update(
    passes: TracedModel, states: _States, division: ZeroLayout, held: dict[str, float], lazily: bool
) -> MemorySnapshot:
    """The highest of the moments of an optimizer step.

    Args:
        passes: Of the config.
        states: Of the process.
        division: How DeepSpeed divides them.
        held: What is there before and after.
        lazily: A buffer takes memory only as far as it has been filled, as on a CPU.
    """
    again = passes.work.passes > 1
    moments = {name: moment for name, moment in passes.update.items() if not name.startswith("more") or again}
    base = {name: size for name, size in held.items() if name != GRADIENTS} | {BUFFERS: states.buffers}
    if division.stage is not None:  # the gradients that a pass has made so far are in a bucket, or divided
        coming = lazily and division.stage in (1, 2) and not again
        found = []
        for moment in moments.values():
            filled = {BUFFERS: min(states.buffers, moment.parts.get(GRADIENTS, 0.0))} if coming else {}
            gradients = {GRADIENTS: 0.0 if coming else states.gradients}
            found.append(_sum(base | filled, MemorySnapshot(moment.parts | gradients)))
    else:
        found = [_sum(base, moment) for moment in moments.values()]
    found.append(MemorySnapshot(base | {GRADIENTS: states.gradients, OPTIMIZER: states.optimizer + states.step}))
    return max(found, key=lambda moment: moment.total)


def _sum(base: Mapping[str, float], moment: MemorySnapshot) -> MemorySnapshot:
    parts = dict(base)
    for name, size in moment.parts.items():
        parts[name] = parts.get(name, 0.0) + size
    return MemorySnapshot(parts)
