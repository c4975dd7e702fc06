"""Move weights to the device, or divide them among the ranks: one tensor at a time, cast on the way.

A process never holds a second copy of a model, and under ZeRO-3 not even a first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.models.mapped import stored_weight


def place(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put a module on this process's device, floating-point weights in `dtype`."""
    for parameter in module.parameters():
        _cast(parameter, dtype)
    return module.to(distributed.device())  # buffers, weights in 4 bits


def divide(module: nn.Module, dtype: torch.dtype, settings: dict[str, Any]) -> nn.Module:
    """Divide a module among the ranks as ZeRO-3 does, floating-point weights in `dtype`. Every rank calls it.

    DeepSpeed would first cast the whole module, then divide it.

    Args:
        module: Its weights are the same on every rank.
        dtype: The compute dtype of its engine.
        settings: The settings of its engine.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    if all(is_zero_param(parameter) for parameter in module.parameters()):
        return module
    Init(module=_OneByOne(module, dtype), config_dict_or_path=settings, dtype=dtype)
    return module


class _OneByOne(nn.Module):
    """Yields the parameters of a module to DeepSpeed; each is cast when DeepSpeed gets to it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._of = [module]  # in a list, so that it is not a submodule
        self._dtype = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self._of[0].parameters(recurse):
            _cast(parameter, self._dtype)
            yield parameter


@contextmanager
def flattened_one_by_one() -> Iterator[None]:
    """Within this context DeepSpeed's engine below stage 3 moves the trained weights into its flat buffer one by one.

    DeepSpeed concatenates them, which takes a second copy of all: on the CPU, or in host memory if the GPU has no room
    for one. It has no option for this, so the one method (0.19.8) is replaced.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    whole = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = flatten_one_by_one
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = whole


def flatten_one_by_one(
    optimizer: Any, parameters: Sequence[Any], alignment: int, use_cpu_data: bool = False,
    param_padding: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """A flat tensor of the parameters' elements; each parameter becomes a view of it, which frees its own memory.

    Args:
        optimizer: DeepSpeed's; unused, since this replaces its method.
        parameters: Of one dtype on one device.
        alignment: The length becomes a multiple of it.
        use_cpu_data: Read `cpu_data`, to which DeepSpeed has moved the weights, instead of `data`.
        param_padding: Elements of zero after each parameter.
    """
    del optimizer
    where = "cpu_data" if use_cpu_data else "data"
    paddings = param_padding or [0] * len(parameters)
    first = getattr(parameters[0], where)
    length = sum(getattr(parameter, where).numel() for parameter in parameters) + sum(paddings)
    flat = torch.empty(length + -length % alignment, dtype=first.dtype, device=first.device)
    offset = 0
    for parameter, padding in zip(parameters, paddings):
        weight = getattr(parameter, where)
        end = offset + weight.numel()
        setattr(parameter, where, flat[offset:end].view(weight.shape).copy_(weight))
        flat[end : end + padding].zero_()
        offset = end + padding
    flat[offset:].zero_()
    return flat


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
        parameter.data = stored_weight(parameter).to(distributed.device(), dtype)
        vars(parameter).pop("put_together", None)  # which holds the file
