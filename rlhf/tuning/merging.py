"""Full weights of a model: gathered under ZeRO-3, adapters merged, 4-bit weights dequantised; adapters switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from rlhf.core.console import is_main
from rlhf.models.forward import causal_lm, has_virtual_tokens
from rlhf.tuning.quantization import dequantised, is_quantised, quant_state


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """Within this context, parameters partitioned by ZeRO-3 are complete. Changes are lost. Every rank calls it."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def merged_parts(model: Any) -> Iterator[dict[str, Tensor]]:
    """The full weights with adapters merged, under transformers' names, module by module: a caller may drop a part
    before it takes the next. The live weights do not change.

    Every rank calls it. Rank 0 gets copies on the CPU in the dtype of the weights (4-bit weights dequantised); other
    ranks get nothing. Each name of a tied weight has a copy of its own.

    Args:
        model: A transformers model, maybe wrapped by PEFT.
    """
    for prefix, module in _layers(causal_lm(model), ""):
        with torch.no_grad():
            yield {prefix + name: weight for name, weight in _copied(module).items()}


def merged_shapes(base: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Shapes of what `merged_parts` yields: name -> (a mark, an empty tensor of its shape and dtype).

    Names of one (tied) parameter have the same mark.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    marks: dict[int, Tensor] = {}
    for prefix, module in _layers(base, ""):
        for name, tensor in (_own_weights(module) | _buffers(module)).items():
            packed = quant_state(tensor)
            shape, dtype = (tensor.shape, tensor.dtype) if packed is None else (packed.shape, packed.dtype)
            empty = torch.empty(getattr(tensor, "ds_shape", shape), dtype=dtype, device="meta")
            found[prefix + name] = (marks.setdefault(id(tensor), torch.empty(1)), empty)
    return found


def merged_weights(model: Any, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights with adapters merged, under transformers' names, module by module on the device of the model.

    Every rank gets them. Under ZeRO-3 a module is gathered while its weights are yielded, so every rank must iterate
    over all of them, in step with the others. Tied weights come under each of their names. A weight without an adapter
    is the live weight itself: copy it, do not write to it.

    Args:
        model: A transformers model, maybe wrapped by PEFT.
        merge: False for the weights of the base, without adapters.
    """
    for prefix, module in _layers(causal_lm(model), ""):
        adapted = isinstance(module, BaseTunerLayer)
        with gathered(module.parameters(recurse=adapted)):
            if adapted and merge:
                found = _merged_layer(module)
            else:
                found = {name: dequantised(p) for name, p in _own_weights(module).items()}
            yield from ((prefix + name, weight) for name, weight in found.items())


def weight_marks(model: Any, merge: bool = True) -> dict[str, int]:
    """The names that `merged_weights` yields -> a mark, the same for names of one tensor. No weights are gathered."""
    return {
        prefix + name: id(module) if merge and isinstance(module, BaseTunerLayer) else id(parameter)
        for prefix, module in _layers(causal_lm(model), "")
        for name, parameter in _own_weights(module).items()
    }


def adapter_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Names (as in transformers) and modules of the layers with adapters."""
    for prefix, module in _layers(causal_lm(model), ""):
        if isinstance(module, BaseTunerLayer):
            yield prefix.removesuffix("."), module


def trains_more_than_adapters(model: Any) -> bool:
    """Whether any weights outside of adapters are trained."""
    return any(p.requires_grad for _, module in _layers(causal_lm(model), "") for p in _own_weights(module).values())


def _own_weights(module: Any) -> dict[str, Any]:
    """Parameters of one module of `_layers`, without those of adapters."""
    if isinstance(module, BaseTunerLayer):
        return dict(module.get_base_layer().named_parameters())
    return dict(module.named_parameters(recurse=False))


def _buffers(module: Any) -> dict[str, Any]:
    """Buffers that are saved, of one module of `_layers`; an adapter layer has none."""
    left_out = module._non_persistent_buffers_set
    own = () if isinstance(module, BaseTunerLayer) else module.named_buffers(recurse=False)
    return {name: buffer for name, buffer in own if name not in left_out}


def _layers(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(Name prefix, module) of the modules that may own weights; an adapter layer counts as one module."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    yield prefix, module
    if not isinstance(module, BaseTunerLayer):
        for name, child in module.named_children():
            yield from _layers(child, f"{prefix}{name}.")


def _copied(module: Any) -> dict[str, Tensor]:
    """Copies of a module's own weights, merged if it is an adapter layer."""
    adapted = isinstance(module, BaseTunerLayer)
    if adapted:
        with gathered(list(module.parameters())):
            return {name: value.cpu() for name, value in _merged_layer(module).items()} if is_main() else {}
    found = {}
    for name, parameter in _own_weights(module).items():  # one at a time: a layer's experts are only two
        with gathered([parameter]):
            if is_main():
                found[name] = dequantised(parameter).to("cpu", copy=True)
    if is_main():
        found |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in _buffers(module).items()}
    return found


def _merged_layer(layer: Any) -> dict[str, Tensor]:
    """Weight and bias of an adapter layer with its adapter merged."""
    base = layer.get_base_layer()
    if is_quantised(layer):
        rest = {name: p.detach().clone() for name, p in base.named_parameters() if name != "weight"}
        weight = dequantised(base.weight)
        return {"weight": weight + layer.get_delta_weight(layer.active_adapters[0]).to(weight), **rest}
    live = {parameter.data_ptr() for parameter in base.parameters()}
    with adapters_merged(layer):
        merged = {name: parameter.data for name, parameter in base.named_parameters()}
        return {name: data.clone() if data.data_ptr() in live else data for name, data in merged.items()}


@contextmanager
def adapters_merged(model: Any) -> Iterator[None]:
    """Within this context the active adapters are merged into the base weights and the LoRA layers are bypassed.

    A module of experts has an adapter layer for each weight, one in the other.

    Afterwards the weights are restored bit for bit. This costs a second copy of the adapted weights, which must be
    complete on this process. Adapters of 4-bit layers are not merged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in layers if not is_quantised(layer)]
    before = [(p, p.data) for layer in layers for p in layer.get_base_layer().parameters()]
    adapted = set(layers)
    children = [(m._modules, name, x) for m in model.modules() for name, x in m._modules.items() if x in adapted]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # `safe_merge`: PEFT replaces the tensor by a merged copy
        for siblings, name, layer in children:
            siblings[name] = layer.get_base_layer()
        yield
    finally:
        for siblings, name, layer in children:
            siblings[name] = layer
        for parameter, data in before:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context adapter layers pass their input only through the base: the policy is its own reference.

    Gives the model to call: the base itself where virtual tokens precede the text. Unlike PEFT's `disable_adapter` this
    leaves requires_grad unchanged, because an engine depends on it.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with attribute_set(layers, "_disable_adapters", True):
        yield causal_lm(model) if has_virtual_tokens(model) else model


@contextmanager
def attribute_set(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Within this context the attribute `name` of the objects is `value`."""
    before = [getattr(one, name) for one in objects]
    for one in objects:
        setattr(one, name, value)
    try:
        yield
    finally:
        for one, old in zip(objects, before):
            setattr(one, name, old)
