"""Weights on their way to the device, or to each rank's share: one tensor after another, cast as it goes.

So a process never holds a second copy of a model, and under ZeRO-3 not even a first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf import distributed


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
        settings: Those of its engine.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

    if all(is_zero_param(parameter) for parameter in module.parameters()):
        return module
    Init(module=_OneByOne(module, dtype), config_dict_or_path=settings, dtype=dtype)
    return module


class _OneByOne(nn.Module):
    """Shows DeepSpeed the parameters of a module; each is cast when it is its turn."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._of = [module]  # in a list, so that it is no submodule
        self._dtype = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self._of[0].parameters(recurse):
            _cast(parameter, self._dtype)
            yield parameter


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
        parameter.data = parameter.data.to(distributed.device(), dtype)
