"""Weights in 4 bits: packed by bitsandbytes, and unpacked where a plain tensor is needed."""

from __future__ import annotations

from typing import Any

from rlhf.core.errors import need_package
from rlhf.core.lazy import nn, torch
from rlhf.tuning.layers import layers_of


def quantize(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise the linear weights of the layers to 4 bits, in place and on `device`; they compute in `dtype`.

    Heads and embeddings are not quantised.
    """
    need_package("bitsandbytes", "tuning: qlora", "pip install 'rlhf-rankings[gpu]'")
    import bitsandbytes as bnb

    model.requires_grad_(False)
    kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    for layer in layers_of(model)[1]:
        for path, linear in [(p, m) for p, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            shape, bias = (linear.in_features, linear.out_features), linear.bias
            small = bnb.nn.Linear4bit(*shape, bias is not None, compute_dtype=dtype, **kind)
            small.weight, small.bias = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **kind), bias
            layer.set_submodule(path, small.to(device))
    model.is_loaded_in_4bit = True  # tells PEFT which kind of LoRA layer to use
    model.to(device)


def quant_state(parameter: Any) -> Any:
    """How bitsandbytes packed a 4-bit weight; None for any other weight."""
    return getattr(parameter, "quant_state", None)


def is_quantised(layer: Any) -> bool:
    """Whether an adapter layer's base is in 4 bits. A module of experts has no `weight`, and never is."""
    return quant_state(getattr(layer.get_base_layer(), "weight", None)) is not None


def dequantised(parameter: Any) -> torch.Tensor:
    """The weight as a plain tensor, dequantised if it is in 4 bits."""
    if quant_state(parameter) is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)
