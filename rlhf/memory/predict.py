"""The predicted peak memory of a run: by phase and part, for each process, under any ZeRO stage.

The memory of the passes comes from `rlhf.memory.traced_model`, which traces the real modules on fake tensors. The rest
is arithmetic: weights, gradients, the optimizer's state and float32 masters, partitioned as each ZeRO stage does, and
DeepSpeed's buffers (deepspeed 0.19, runtime/zero/stage_1_and_2.py and stage3.py, runtime/bf16_optimizer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf.core.table import Pick
from rlhf.distributed.deepspeed_json import with_sizes
from rlhf.memory.traced_model import TracedModel
from rlhf.memory.tracer import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, OPTIMIZER, MemorySnapshot
from rlhf.ppo.config import PPOConfig
from rlhf.tuning.shards import SHARD_BYTES

WEIGHTS, BUFFERS, PROCESS = "weights", "DeepSpeed's buffers", "libraries at work"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, CACHE, BUFFERS, PROCESS)
LIBRARIES, LIBRARIES_DEEPSPEED = 40e6, 90e6
"""Bytes of a process on a CPU besides tensors, measured: code that is loaded when first used; with DeepSpeed."""
PHASES = ("load", "rollout", "scoring", "update", "checkpoint")


@dataclass(frozen=True)
class ZeroLayout:
    """What DeepSpeed partitions over the processes and what it offloads to host memory; sizes in elements."""

    stage: int | None = None
    """ZeRO stage; None for plain torch in one process."""
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    bucket: float | None = None
    """Gradients that are reduced together; None where the file does not say it."""
    sub_group: float | None = None
    """Weights of a part of stage 3's optimizer; None where the file does not say it."""
    buckets: int = 1
    """Number of buckets that are filled in turn."""
    live: float = 1e9
    """The most weights that stage 3 keeps gathered."""

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> ZeroLayout:
        """From a DeepSpeed JSON; plain torch without one."""
        if settings is None:
            return cls()
        zero = settings.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))

        def number(key: str, default: Any) -> Any:
            return default if zero.get(key, "auto") == "auto" else float(zero[key])

        return cls(
            stage,
            "offload_optimizer" in zero,
            "offload_param" in zero,
            number("reduce_bucket_size", None),
            number("sub_group_size", None),
            2 if zero.get("overlap_comm", stage == 3) is True and stage < 3 else 1,
            number("stage3_max_live_parameters", 1e9) + number("stage3_prefetch_bucket_size", 5e7),
        )

    def sized(self, trained: int, largest: int) -> ZeroLayout:
        """With the sizes that the engine chooses for trained weights where the file names none."""
        chosen = with_sizes({"zero_optimization": {"stage": 3}}, trained, largest)["zero_optimization"]
        bucket = chosen["reduce_bucket_size"] if self.bucket is None else self.bucket
        sub_group = chosen["sub_group_size"] if self.sub_group is None else self.sub_group
        return replace(self, bucket=bucket, sub_group=sub_group)


@dataclass(frozen=True)
class Prediction:
    """Bytes of one process."""

    phases: dict[str, MemorySnapshot]
    """Phase -> memory at its peak, on the GPU, or in host memory without a GPU."""
    host: float
    """Peak host memory of a process with a GPU."""
    writer: float = 0.0
    """More of it on rank 0, which writes the result."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> float:
        return self.phases[self.peak_phase].total


class _Counts:
    """Numbers of parameters of the engine (the trained models) and of the frozen models."""

    def __init__(self, traced: TracedModel, optimizer: Pick) -> None:
        sizes = list(zip(traced.roles, traced.sizes))
        mine = [size for role, size in sizes if role.tuning is not None]
        frozen = [size for role, size in sizes if role.tuning is None and not role.whole]
        shapes, traits = [shape for size in mine for shape in size.shapes], optimizer.row.traits
        self.policy = traced.sizes[0].total
        self.engine, self.trained = sum(size.total for size in mine), sum(size.trained for size in mine)
        self.largest = max(size.largest for size in mine)
        """Elements of the largest parameter."""
        self.group = max(size.trained for size in mine)
        """Trained parameters of the largest optimizer group."""
        self.tensors = [math.prod(shape) for shape in shapes]
        """Sizes of the trained tensors."""
        self.states = sum(map(traits["state"], shapes))
        """Bytes of the optimizer's state."""
        self.scratch = 4.0 * traits["scratch"] * max(self.tensors)
        """Bytes of temporary tensors in the optimizer's step."""
        self.frozen = sum(size.held for size in frozen)
        """Bytes of the frozen models."""
        self.whole = sum(size.held for role, size in sizes if role.whole)
        """Bytes of those that no ZeRO stage divides."""
        self.engines = (self.engine, *(size.total for size in frozen))
        """Parameters of each DeepSpeed engine under stage 3: one for the trained models and one per frozen model."""


def predict(
    traced: TracedModel, layout: ZeroLayout, processes: int, gpu: bool, optimizer: Pick | None = None
) -> Prediction:
    """The peaks of a run on `processes` processes; the optimizer is that of the traced config if None."""
    config: Any = traced.config
    count = _Counts(traced, optimizer or config.optimizer.algorithm)
    layout = layout.sized(count.trained, max(count.tensors))
    width = traced.weights.itemsize
    states = _plain_states(traced, count)
    if layout.stage is not None:
        states = _deepspeed_states(traced, count, layout, processes, gpu)
    states.weights += count.frozen / (processes if layout.stage == 3 else 1) + count.whole
    process = {} if gpu else {PROCESS: LIBRARIES if layout.stage is None else LIBRARIES_DEEPSPEED}
    kept = {GRADIENTS: states.gradients} if layout.stage == 3 else {}  # its buffers are added once they are in use
    phases = {
        "load": MemorySnapshot(process | kept | {WEIGHTS: states.weights + states.load, OPTIMIZER: states.masters})
    }
    held = MemorySnapshot(process | kept | {WEIGHTS: states.weights, OPTIMIZER: states.optimizer})
    held |= {BUFFERS: states.buffers} if layout.stage == 3 else {}
    # Stage 3 gathers the weights of a pass, of one engine after the other if several are used.
    gathered = [min(size, states.live) * width for size in count.engines]
    if isinstance(traced.config, PPOConfig):
        whole = count.policy * width if layout.stage == 3 else 0.0
        if traced.autocast:  # its frozen weights, cast while it samples
            whole += traced.compute.itemsize * (traced.sizes[0].total - traced.sizes[0].trained)
        phases["rollout"] = held.plus({WEIGHTS: whole}).plus(_highest(traced.rollout.values()))
    phases["scoring"] = held.plus({WEIGHTS: sum(gathered)}).plus(traced.scoring)
    learning = held.plus({WEIGHTS: gathered[0]})
    phases["update"] = _update(traced, states, layout, learning, lazily=not gpu)
    # a teacher's pass comes between forward and backward; as if both had their peaks at the same time
    phases["update"] = phases["update"].plus(traced.passes.get("teacher", {}))
    phases["checkpoint"] = held.plus({WEIGHTS: 0.0 if gpu else count.policy * width})
    if not gpu:
        return Prediction(phases, 0.0)
    if layout.stage is None:  # loaded whole in float32
        return Prediction(phases, 4 * count.engine)
    # One tensor on its way from the mapped file to the GPU; rank 0 writes the result file by file.
    return Prediction(phases, states.host + 4 * count.largest, min(SHARD_BYTES, width * count.policy))


@dataclass
class _States:
    """Bytes of one process between the passes, and the additional bytes of an update."""

    weights: float
    optimizer: float
    gradients: float
    masters: float = 0.0
    """The part of `optimizer` that exists from the start; the algorithm's state is allocated in the first step."""
    load: float = 0.0
    """Additional bytes while the engine is initialised."""
    buffers: float = 0.0
    step: float = 0.0
    """Gradients in the optimizer's dtype, during its step."""
    host: float = 0.0
    live: float = 0.0
    """Stage 3: the most elements that an engine keeps gathered."""


def _plain_states(traced: TracedModel, count: _Counts) -> _States:
    width = traced.compute.itemsize if traced.shared else 4.0  # of the frozen ones
    if any(role.tuning.row.traits["quantized"] for role in traced.roles if role.tuning is not None):
        width = 0.56  # 4 bits, and their scales
    weights = width * (count.engine - count.trained) + 4 * count.trained
    return _States(weights, count.states, 4 * count.trained, step=count.scratch)


def _deepspeed_states(traced: TracedModel, count: _Counts, layout: ZeroLayout, processes: int, gpu: bool) -> _States:
    """States under DeepSpeed. With offload, the GPU holds what a pass needs."""
    n, width, stage = processes, traced.weights.itemsize, layout.stage or 0
    mixed = width < 4
    masters, states_and_masters = 4 * count.trained / n, (count.states + 4 * count.trained) / n
    assert layout.bucket is not None and layout.sub_group is not None
    # On a CPU, memory that was never written is not resident.
    bucket = layout.bucket if gpu else min(layout.bucket, count.trained)
    sub_group = 4 * min(count.trained, layout.sub_group)
    if stage == 0:
        # float32: the module and a flat copy of a bucket; bfloat16: BF16_Optimizer, which partitions the masters
        buffers = min(layout.bucket, count.trained) * 4.0
        if not mixed:
            return _States(4 * count.engine, count.states, 4 * count.trained, buffers=buffers, step=count.scratch)
        return _States(2 * count.engine, states_and_masters, 6 * count.trained, masters, 2 * count.group)
    if stage < 3:
        states = _States(
            width * count.engine,
            states_and_masters,
            width * (count.trained / n if stage == 2 else count.trained),
            masters,
            buffers=bucket * width * (layout.buckets if gpu else 1),
            step=4 * count.group / n,
            # the optimizer's first gradients, of a group's masters; on a GPU training needs more
            load=0.0 if gpu else 4 * count.group / n,
        )
    else:
        states = _States(
            width * count.engine / n,
            states_and_masters,
            width * count.trained / n,
            masters,
            load=sub_group,  # its optimizer's first gradients, of a whole sub-group
            buffers=bucket * width,
            step=sub_group / n if mixed else 0.0,
            live=layout.live,
        )
    if layout.optimizer_on_host:
        kept = masters  # their gradients, from the start on
        if stage < 3:  # the new weights on their way to the device
            kept += width * count.trained / n
            states.load = 0.0
        if gpu and (stage == 3 or traced.batch.micro_batches > 1):  # gradients summed over micro-batches
            kept += width * count.trained / n
        states.step = 0.0
        if gpu:
            states.host += states.optimizer + kept
            states.optimizer = states.masters = states.load = states.gradients = 0.0
            if stage < 3:  # gradients go to the host from the buckets, except those of tensors that fit into none
                states.gradients = float(width * sum(size for size in count.tensors if size > layout.bucket))
                states.buffers += width * max(count.tensors)
        else:
            states.optimizer += kept
            states.masters += kept
    if gpu and layout.weights_on_host and stage == 3:
        states.host += states.weights
        states.weights = 0.0
    return states


def _update(
    traced: TracedModel, states: _States, layout: ZeroLayout, held: MemorySnapshot, lazily: bool
) -> MemorySnapshot:
    """The highest peak of an optimizer step.

    Args:
        traced: The config's traced model.
        states: The states of the process.
        layout: How DeepSpeed partitions them.
        held: Memory in use before and after the step.
        lazily: Whether a buffer takes memory only as far as it has been filled, as on a CPU.
    """
    accumulates = traced.batch.micro_batches > 1
    base = MemorySnapshot(held | {GRADIENTS: 0.0, BUFFERS: states.buffers})
    filling = lazily and layout.stage in (1, 2) and not accumulates
    found = []
    for name, snapshot in traced.update.items():
        if name.startswith("more") and not accumulates:
            continue
        filled = {BUFFERS: min(states.buffers, snapshot.get(GRADIENTS, 0.0))} if filling else {}
        if layout.stage is not None:  # the gradients so far are in a bucket, or partitioned
            snapshot = MemorySnapshot(snapshot | {GRADIENTS: 0.0 if filling else states.gradients})
        found.append(MemorySnapshot(base | filled).plus(snapshot))
    return _highest([*found, base.plus({GRADIENTS: states.gradients, OPTIMIZER: states.step})])


def _highest(snapshots: Iterable[MemorySnapshot]) -> MemorySnapshot:
    return max(snapshots, key=lambda snapshot: snapshot.total)
