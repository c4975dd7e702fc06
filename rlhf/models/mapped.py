"""Models whose weights stay memory-mapped, in the dtype of the file, until an engine places them.

A change of dtype while loading makes a private copy of the whole model in every process, and the processes of a host
load at the same time. Mapped pages are read when needed and shared by the processes; the engine casts one tensor after
another as it moves them to the device or divides them among the ranks (`rlhf.training.placing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.pytorch_utils import Conv1D

from rlhf.core.console import say
from rlhf.core.freeing import freed_at_once


@contextmanager
def stored_dtypes() -> Iterator[None]:
    """Within this context `from_pretrained` leaves the tensors that it reads, except vectors, in the dtype of the file;
    everything else gets the requested dtype. Weights that it joins from several tensors of the file (experts) are
    joined later, one at a time (see `stored_weight`).

    Loading in the file's dtype is not the same: buffers, such as Gemma's factor of the embeddings, and missing weights
    would be computed in it, and files with several dtypes would be rounded.
    """
    # The two functions of transformers (5.23) that read a tensor of a file, and join tensors; it has no option to leave
    # out the cast, or to join later.
    loading: Any = core_model_loading
    read, convert = loading._materialize_copy, loading.WeightConverter.convert

    def as_stored(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        found = read(tensor, device, None)
        as_it_is = dtype is None or (found.is_floating_point() and found.dim() > 1)
        return found if as_it_is else found.to(dtype)

    def later(converter: Any, name: str, model: Any = None, hf_quantizer: Any = None, **more: Any) -> dict[str, Any]:
        if hf_quantizer is not None or not all(isinstance(op, PUT_TOGETHER) for op in converter.operations):
            model.holds_copies = True
            held: dict[str, Any] = convert(converter, name, model=model, hf_quantizer=hf_quantizer, **more)
            return held
        parts = converter.materialize_tensors()

        def values(device: str) -> dict[str, Tensor]:
            converter.collected_tensors = {key: [part.to(device) for part in found] for key, found in parts.items()}
            made: dict[str, Tensor] = convert(converter, name, config=more.get("config"))
            return made

        found: dict[str, Any] = {}
        for target, empty in values("meta").items():
            found[target] = nn.Parameter(_placeholder(empty.shape, empty.dtype))
            found[target].put_together = partial(lambda target: values("cpu")[target], target)
        return found

    loading._materialize_copy, loading.WeightConverter.convert = as_stored, later
    try:
        yield
    finally:
        loading._materialize_copy, loading.WeightConverter.convert = read, convert


PUT_TOGETHER = (core_model_loading.MergeModulelist, core_model_loading.Concatenate, core_model_loading.Transpose)
"""Steps of transformers' conversions that depend on nothing but the tensors of the file."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts now; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _placeholder(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape that stores one element."""
    return torch.zeros((), dtype=dtype).expand(shape)


def stored_weight(parameter: Any) -> Tensor:
    """A weight as it is in the file: mapped, or joined from several of its tensors, which makes a copy."""
    make: Any = getattr(parameter, "put_together", None)
    found: Tensor = parameter.data if make is None else make()
    return found


def prepare(model: nn.Module, dtype: torch.dtype, heads: tuple[str, ...]) -> None:
    """Prepare a model with weights as stored for adapters and tests, before its engine exists.

    Buffers of the file and heads are cast to `dtype`, and PEFT creates adapters in `dtype`: it would take the dtype of
    the base, and round their initial values.

    Args:
        model: From `stored_dtypes`.
        dtype: The dtype in which the engine trains, or float32.
        heads: Names of the modules that are cast: the small heads of classifiers.
    """
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dim() > 1 and key not in module._non_persistent_buffers_set:
                buffer.data = buffer.data.to(dtype)
        if name in heads:
            module.to(dtype)
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            for p in own:
                if hasattr(p, "put_together"):
                    p.data = _placeholder(p.shape, dtype)
                elif p.dim() > 1:  # routers: PEFT takes their dtype for adapters, which it would round
                    p.data = p.data.to(dtype)
        if any(p.dtype != dtype or hasattr(p, "put_together") for p in own) and not hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # PEFT reads it, as for layers in 4 bits
    if getattr(model, "holds_copies", False):
        say(
            f"Loading: transformers converts weights of {type(model).__name__} while it loads them; every process holds"
            " a copy of those until they are placed"
        )


def dtype_of(model: nn.Module) -> torch.dtype:
    """The compute dtype of a model, or what it will be once its engine has cast it."""
    marks = (getattr(module, "compute_dtype", None) for module in model.modules())
    return next((dtype for dtype in marks if dtype is not None), next(model.parameters()).dtype)


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Within this context a model with weights as stored computes as it will once they are cast.

    The weights of each module are cast before it runs and put back after, so only one module's are copied at a time.
    The copies leave no holes in the heap: the shares of a model that is divided later would fill them, and the holes
    would stay resident after DeepSpeed has moved the shares to its own buffers.
    """
    marked: list[tuple[nn.Module, Any]] = [
        (m, m.compute_dtype) for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)
    ]
    stored: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def put_back(module: nn.Module, *_: Any) -> None:
        for p, data in stored.pop(module):
            p.data = data

    def cast_to(dtype: torch.dtype) -> Any:
        def cast(module: nn.Module, *_: Any) -> None:
            own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
            stored[module] = [(p, p.data) for p in own]
            for p in own:
                p.data = stored_weight(p).to(dtype)

        return cast

    hooks = [m.register_forward_pre_hook(cast_to(dtype)) for m, dtype in marked]
    hooks += [m.register_forward_hook(put_back) for m, _ in marked]
    try:
        with freed_at_once() if marked else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(stored):  # of a forward pass that failed
            put_back(module)
