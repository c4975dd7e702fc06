"""The memory that torch code allocates, traced on fake tensors, which have shapes but no storage.

with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
with fake_tensors():                          # torch's FakeTensorMode: nothing is computed or allocated
    use_fake_weights(model)
    with MemoryTracer([model], selected=512) as tracer:
        loss_of(model, ids).backward()
    tracer.highest()                          # bytes by part at the peak

The real code runs, so chunks, gradient checkpointing, adapters and the attention implementation are counted. Operations
are traced as on a CPU. The scratch memory of kernels and the rounding of allocators are not seen.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, LOGITS, GRADIENTS, OPTIMIZER, CACHE = "activations", "logits", "gradients", "optimizer", "KV cache"
aten = torch.ops.aten
# Not torch's own MemTracker: it finds the same peak (8-layer Llama, torch 2.13) in 5.2 s instead of 1.4 s, fails on
# boolean masks (DynamicOutputShapeException), and separates neither logits, KV cache nor peaks between marks.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within this context, new tensors have a shape, a dtype and a device, but no storage.

    torch logs a traceback before it raises the error of a kernel that has no fake form; the error is enough.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.setLevel(level)


def use_fake_weights(model: nn.Module) -> nn.Module:
    """Give a model on the meta device fake weights on the CPU, in place. Tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = made.setdefault(id(old), nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


class MemorySnapshot(dict[str, float]):
    """The memory in use at one moment: part -> bytes."""

    @property
    def total(self) -> float:
        return sum(self.values())

    def plus(self, other: Mapping[str, float]) -> MemorySnapshot:
        """The sum, part by part."""
        return MemorySnapshot({**self, **{name: self.get(name, 0.0) + size for name, size in other.items()}})

    def extrapolate(self, other: MemorySnapshot, steps: float) -> MemorySnapshot:
        """Linear extrapolation: this snapshot plus `steps` times the difference to `other`, part by part."""
        pairs = {name: (self.get(name, 0.0), other.get(name, 0.0)) for name in [*self, *other]}
        return MemorySnapshot({name: max(0.0, mine + steps * (its - mine)) for name, (mine, its) in pairs.items()})


def _grouped_shape(left: Tensor, right: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """The shape of torch's `_grouped_mm`: matrices [T, K] x [E, K, N] of T tokens and E experts, or their gradients.

    A two-dimensional factor holds the groups one after the other, each up to its place in `ends`, int64 [E].
    """
    if left.dim() == right.dim() == 2:
        assert ends is not None
        return (ends.shape[0], left.shape[0], right.shape[1])
    if left.dim() == right.dim() == 3:
        return (left.shape[0], left.shape[1], right.shape[2])
    return (left.shape[-2], right.shape[-1])


class MemoryTracer(TorchDispatchMode):
    """Records when operations allocate storages and when these are freed.

    Args:
        held: Modules whose weights exist before the trace and are not counted.
        selected: How many elements a boolean mask selects when it is used as an index; a fake mask has no values.
        vocab_size: A tensor with this as its first or last dimension counts as logits.
    """

    def __init__(self, held: Iterable[nn.Module] = (), selected: int = 0, vocab_size: int = -1) -> None:
        super().__init__()
        self.selected, self.vocab_size = selected, vocab_size
        self.events: list[tuple[int, int]] = []  # (number of a storage, change in bytes)
        self.kinds: list[str] = []  # by number
        self.marks: dict[str, int] = {}
        self._numbers: dict[int, int] = {}  # storage's address -> its number, while it lives
        self._known = {t.untyped_storage()._cdata for m in held for t in (*m.parameters(), *m.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:  # `.item()` of a fake value: a mask is not all True
            return False if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            return self._note(args[0].new_empty((self.selected, args[0].dim()), dtype=torch.int64))
        if func is aten._grouped_mm.default:  # experts; torch's fake kernel takes bfloat16 alone, a CPU's float32 too
            ends = args[2] if args[2:] else (kwargs or {}).get("offs")
            return self._note(args[0].new_empty(_grouped_shape(args[0], args[1], ends)))
        if func in INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _without_masks(self, indices: Any) -> list[Any]:
        """The indices, with each boolean mask replaced by the positions that it selects."""
        found: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += [index.new_empty(self.selected, dtype=torch.int64) for _ in range(index.dim())]
            else:
                found.append(index)
        return found

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known or address in self._numbers:
            return tensor
        size, number = storage.nbytes(), len(self.kinds)
        self._numbers[address] = number
        head = tensor.dim() > 1 and self.vocab_size in (tensor.shape[0], tensor.shape[-1])
        self.kinds.append(LOGITS if head else ACTIVATIONS)
        self.events.append((number, size))
        weakref.finalize(storage, self._freed, address, number, size).atexit = False
        return tensor

    def _freed(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        self.events.append((number, -size))

    def label(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Count these tensors as `kind`, from their allocation on."""
        for tensor in tensors:
            number = None if tensor is None else self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = kind

    def mark(self, name: str) -> None:
        """Give the current moment a name."""
        self.marks[name] = len(self.events)

    def highest(self, start: str | None = None, end: str | None = None, without: str | None = None) -> MemorySnapshot:
        """The memory in use at the peak between two marks.

        Args:
            start: A mark; the beginning by default.
            end: A mark; the end by default.
            without: A part that does not count when the peak is chosen.
        """
        first, last = self.marks.get(start or "", 0), self.marks.get(end or "", len(self.events))
        parts: dict[str, float] = {}
        most, best = -1.0, dict[str, float]()
        weight = 0.0
        for place, (number, size) in enumerate(self.events[:last]):
            kind = self.kinds[number]
            parts[kind] = parts.get(kind, 0.0) + size
            weight += 0.0 if kind == without else size
            if place >= first - 1 and weight > most:
                most, best = weight, dict(parts)
        return MemorySnapshot(best)
