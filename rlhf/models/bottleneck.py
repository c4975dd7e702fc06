"""Bottleneck adapters as a method of PEFT: a small network after a part of a layer, out + up(activation(down(out))).

    houlsby   two per layer, after the attention and after the MLP (Houlsby et al. 2019, section 2.1)
    pfeiffer  one per layer, after the MLP (Pfeiffer et al. 2021, section 3.2.1)

PEFT has no such method. This one is registered when the module is imported, so PEFT saves, loads and switches it like
any other. Each layer keeps a dictionary of named adapters. An adapter is nonlinear, so it cannot be merged into
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

BOTTLENECK: Any = "BOTTLENECK"
"""PEFT's type of these adapters, in adapter_config.json."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class BottleneckConfig(PeftConfig):
    """The content of adapter_config.json."""

    size: int = 64
    """Width of the bottleneck, m."""
    activation: str = "gelu"
    """A key of ACTIVATIONS."""
    placement: str = "pfeiffer"
    target_modules: Any = None
    """Full names of the modules whose output is adapted."""
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base, followed by the active adapters.

    Attributes:
        bottleneck_down, bottleneck_up: Name of an adapter -> its linear layers [H] -> [m] and [m] -> [H].
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("activations",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.activations: dict[str, str] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter. Its up-projection is zero, so it changes nothing yet."""
        down, up = nn.Linear(self.width, config.size), nn.Linear(config.size, self.width)
        with torch.no_grad():
            for zero in (down.bias, up.weight, up.bias):
                zero.zero_()
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = config.activation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if isinstance(output, tuple):  # a block of experts may return its router's logits as well
            return (self._adapted(output[0]), *output[1:])
        return self._adapted(output)

    def _adapted(self, output: Tensor) -> Tensor:
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                up = self.bottleneck_up[name]
                hidden = ACTIVATIONS[self.activations[name]](down(output.to(down.weight.dtype)))
                output = output + up(hidden).to(output.dtype)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("A bottleneck adapter is not linear, so it cannot be merged into the base weights.")

    def unmerge(self) -> None:
        raise NotImplementedError("A bottleneck adapter is never merged.")


class BottleneckModel(BaseTuner):
    """Puts a `BottleneckLayer` around each target module of a transformers model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = {}  # noqa: RUF012 - PEFT declares it so

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = self.model.config.get_text_config().hidden_size
        layer = BottleneckLayer(target, adapter_name, width, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # as PEFT does for an additional adapter
        self._replace_module(parent, target_name, layer, target)


if BOTTLENECK not in PEFT_TYPE_TO_CONFIG_MAPPING:
    # PEFT's own `register_peft_method` takes only types that its enumeration knows.
    PEFT_TYPE_TO_CONFIG_MAPPING[BOTTLENECK] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[BOTTLENECK] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[BOTTLENECK] = BottleneckModel.prefix
