"""How much memory a piece of torch code holds, found by running it on tensors that have shapes but no storage.

with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
with imagined():                              # torch's FakeTensorMode: nothing is computed, nothing is allocated
    materialise(model)
    with Meter([model], wanted=512) as meter:
        loss_of(model, ids).backward()
    meter.highest().parts                     # bytes by part at the moment at which most was held

What is run is the real code, so chunks, gradient checkpointing, adapters and the attention implementation count as they
are. Operations are traced as for a CPU; a kernel's own scratch memory and what an allocator rounds up are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, LOGITS, GRADIENTS, OPTIMIZER, CACHE = "activations", "logits", "gradients", "optimizer", "KV cache"
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors have a shape, a dtype and a device, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def materialise(model: nn.Module) -> nn.Module:
    """A model of the meta device with imagined weights on the CPU, tied ones still tied."""
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


def data_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return [*model.parameters(), *model.buffers()]


@dataclass(frozen=True)
class MemorySnapshot:
    """What was held at one moment: bytes by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def plus(self, **parts: float) -> MemorySnapshot:
        """With more bytes in some parts; underscores in names stand for spaces."""
        more = {name.replace("_", " "): size for name, size in parts.items()}
        names = [*self.parts, *(name for name in more if name not in self.parts)]
        return MemorySnapshot({name: self.parts.get(name, 0.0) + more.get(name, 0.0) for name in names})

    def along(self, other: MemorySnapshot, steps: float) -> MemorySnapshot:
        """The line through two moments, `steps` times their distance from this one."""
        names = dict.fromkeys([*self.parts, *other.parts])
        mine, others = self.parts, other.parts
        return MemorySnapshot(
            {n: max(0.0, mine.get(n, 0.0) + steps * (others.get(n, 0.0) - mine.get(n, 0.0))) for n in names}
        )


class Meter(TorchDispatchMode):
    """Counts the storages that operations make while it is on, and notes when they are given up.

    Args:
        held: Modules whose weights exist already and are not counted.
        wanted: How many elements a boolean mask selects, wherever one is used as an index: imagined masks hold nothing.
        vocab_size: A tensor whose last dimension this is holds logits.
    """

    def __init__(self, held: Iterable[nn.Module] = (), wanted: int = 0, vocab_size: int = -1) -> None:
        super().__init__()
        self.wanted, self.vocab_size = wanted, vocab_size
        self.events: list[tuple[int, int]] = []  # (number of a storage, bytes more or less)
        self.kinds: list[str] = []  # by number
        self.marks: dict[str, int] = {}
        self._numbers: dict[int, int] = {}  # storage's address -> its number, while it lives
        self._known = {t.untyped_storage()._cdata for module in held for t in data_of(module)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:  # `.item()` of what has no value: a mask is not all True
            return False if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            return self._note(args[0].new_empty((self.wanted, args[0].dim()), dtype=torch.int64))
        if func in INDEXED:
            args = (args[0], self._selected(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _selected(self, indices: Any) -> list[Any]:
        """Boolean masks among indices as the positions that they select."""
        found: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += [index.new_empty(self.wanted, dtype=torch.int64) for _ in range(index.dim())]
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
        weakref.finalize(storage, self._given_up, address, number, size).atexit = False
        return tensor

    def _given_up(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        self.events.append((number, -size))

    def call(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what these tensors are, from their birth on."""
        for tensor in tensors:
            number = None if tensor is None else self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = kind

    def mark(self, name: str) -> None:
        """Give this moment a name."""
        self.marks[name] = len(self.events)

    def highest(self, start: str | None = None, end: str | None = None, without: str | None = None) -> MemorySnapshot:
        """The moment between two marks at which most was held, bytes by part.

        Args:
            start: A mark; the beginning when left out.
            end: A mark; the end when left out.
            without: A part that does not decide which moment it is.
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
