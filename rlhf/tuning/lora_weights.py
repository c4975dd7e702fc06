"""The weights of a LoRA adapter without its base, for a sampler that has the base and supports LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.tuning.merging import adapter_layers, gathered, trains_more_than_adapters


@dataclass(frozen=True)
class LoraShape:
    """What an engine needs to know before it starts."""

    rank: int
    """The largest rank."""
    modules: list[str]
    """Last parts of the names of the adapted layers (`q_proj`), sorted."""


def lora_shape(model: Any) -> LoraShape | None:
    """The shape of the active adapter, if everything that is trained is LoRA of linear layers; otherwise None.

    DoRA, biases, experts, and adapters next to other trained weights are None: they have to be merged.
    """
    layers = dict(adapter_layers(model))
    if not layers or trains_more_than_adapters(model) or not all(map(_is_plain, layers.values())):
        return None
    rank = max(layer.r[layer.active_adapters[0]] for layer in layers.values())
    return LoraShape(rank, sorted({name.rsplit(".", 1)[-1] for name in layers}))


def lora_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names as in PEFT's files, and tensors `lora_A` [rank, in] and `lora_B` [out, rank], layer by layer.

    `lora_B` is multiplied by the adapter's scale (alpha / rank), so the weight's change is their product. Every rank
    takes all of them; under ZeRO-3 a layer is gathered while its weights are handed out.
    """
    for name, layer in adapter_layers(model):
        active = layer.active_adapters[0]
        a, b = layer.lora_A[active].weight, layer.lora_B[active].weight
        with gathered([a, b]):
            yield f"base_model.model.{name}.lora_A.weight", a.detach()
            yield f"base_model.model.{name}.lora_B.weight", b.detach() * layer.scaling[active]


def _is_plain(layer: BaseTunerLayer) -> bool:
    """Whether a layer adds one product of two matrices to a linear layer, and nothing else."""
    base: Any = layer.get_base_layer()
    if not isinstance(layer, LoraLayer) or not isinstance(base, (nn.Linear, Conv1D)) or len(layer.active_adapters) != 1:
        return False
    active = layer.active_adapters[0]
    return active in layer.lora_A and active not in layer.lora_variant and not layer.lora_bias.get(active, False)
