"""The transformer layers of a model, and the places of bottleneck adapters in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy, nn

if TYPE_CHECKING:
    from rlhf.models import bottleneck
else:
    bottleneck = lazy("rlhf.models.bottleneck")


VIRTUAL_ROWS = {"PROMPT_TUNING": "prompt-tuning", "PREFIX_TUNING": "prefix-tuning"}
"""PEFT's type of a result with virtual tokens -> the row of TUNING that trains it further."""


def layers_of(model: Any) -> tuple[str, Any]:
    """Name and content of the list of transformer layers: the longest ModuleList outside any other; the decoder's in an
    encoder-decoder."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [found for found in lists if not any(found[0].startswith(f"{path}.") for path, _ in lists)]
    if not lists:
        raise UserError(f"tuning: {type(model).__name__} has no list of layers", remedy="Use `modules` with `names`.")
    return max(lists, key=lambda found: (len(found[1]), "decoder" in found[0]))


def stacks_of(model: Any) -> list[tuple[str, Any]]:
    """Name and content of each list of transformer layers: one, or encoder and decoder."""
    if not model.config.is_encoder_decoder:
        return [layers_of(model)]
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for part in (model.get_encoder(), model.get_decoder()):
        name, stack = layers_of(part)
        found.append((f"{names[id(part)]}.{name}", stack))
    return found


def bottleneck_config(
    model: Any,
    *,
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer",
    reduction: PositiveInt = 16,
    size: PositiveInt | None = None,
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
    layers: PositiveInt | None = None,
) -> Any:
    """PEFT's config for the options of the tuning method `bottleneck`, for a model without adapters.

    Raises:
        UserError: There are fewer layers, or a layer has no MLP or attention to adapt.
    """
    width = model.config.get_text_config().hidden_size
    targets = []
    for name, stack in stacks_of(model):
        if layers is not None and layers > len(stack):
            raise UserError(f"tuning.layers: {layers} is more than the {len(stack)} layers of {type(model).__name__}")
        for index in range(len(stack) - (layers or len(stack)), len(stack)):
            attentions, mlp = sublayers(stack[index], width)
            if mlp is None or (placement == "houlsby" and not attentions):
                raise UserError(
                    f"tuning: bottleneck ({placement}) does not work with {type(model).__name__}",
                    f"Its layer {index} has no {'MLP' if mlp is None else 'attention'}"
                    " whose output is added to the hidden states.",
                    "Use lora.",
                )
            targets += [f"{name}.{index}.{end}" for end in [*(attentions if placement == "houlsby" else []), mlp]]
    return bottleneck.BottleneckConfig(
        size=size or max(1, width // reduction), activation=activation, placement=placement,
        target_modules=targets,
    )  # fmt: skip


def go_on(name: str, model: Any, options: dict[str, Any]) -> Any:
    """The model with the adapter that it was loaded with, which must match the tuning method and its options.

    Raises:
        UserError: It does not match.
    """
    found = model.peft_config["default"]
    if found.is_prompt_learning:
        return _go_on_with_virtual_tokens(name, model, found, options)
    if name == "bottleneck":
        wanted = bottleneck_config(model.get_base_model(), **options)
        same = ("placement", "size", "activation", "target_modules")
        if all(getattr(wanted, key) == getattr(found, key) for key in same):
            return model
    raise UserError(
        f"tuning: {name} does not fit model.path, which is a base with a bottleneck adapter",
        "Such an adapter cannot be merged into the weights, so the next stage trains the adapter further.",
        f"Set tuning to {{name: bottleneck, placement: {found.placement}, size: {found.size}, "
        f"activation: {found.activation}}}, with the same `layers`.",
    )


def _go_on_with_virtual_tokens(name: str, model: Any, found: Any, options: dict[str, Any]) -> Any:
    own, tokens = VIRTUAL_ROWS[found.peft_type], found.num_virtual_tokens
    others = {key for key, value in options.items() if key != "tokens" and value not in (None, False, "random")}
    if name == own and options.get("tokens", 20) == tokens and not others:
        return model
    raise UserError(
        f"tuning: {name} does not fit model.path, which is a base with {tokens} learned virtual tokens",
        "They cannot be merged into the weights, so the next stage trains them further, as they are: without an encoder"
        " or projection, which is not saved.",
        f"Set tuning to {{name: {own}, tokens: {tokens}}}, or start from a whole model.",
    )


def sublayers(layer: nn.Module, width: int) -> tuple[list[str], str | None]:
    """The modules of a transformer layer whose outputs are added to its residual stream.

    Args:
        layer: A transformer layer.
        width: Size of the residual stream.

    Returns:
        Names of the output projection of each attention, and of the MLP: the linear layer of `width` outputs that is
        declared last. A block of experts is named itself. None if there is no MLP.
    """
    modules = dict(layer.named_modules())
    attentions = [name for name, module in modules.items() if name and _is(module, r"Attention|Attn")]
    attentions = [name for name in attentions if not _inside(name, attentions)]
    ends = [list(_outputs(modules, width, within=name)) for name in attentions]
    rest = {name: module for name, module in modules.items() if name and not _inside(name, attentions, itself=True)}
    experts = next((name for name, module in rest.items() if _is(module, r"Experts")), None)
    mlp = list(_outputs(rest, width)) if experts is None else [_plain(experts.rpartition(".")[0] or experts)]
    return [end[-1] for end in ends if end], mlp[-1] if mlp else None


def _is(module: nn.Module, pattern: str) -> bool:
    return re.search(pattern, type(module).__name__) is not None


def _inside(name: str, parents: list[str], itself: bool = False) -> bool:
    return any(name.startswith(f"{parent}.") or (itself and name == parent) for parent in parents)


def _outputs(modules: dict[str, nn.Module], width: int, within: str = "") -> Iterator[str]:
    from transformers.pytorch_utils import Conv1D

    for name, module in modules.items():
        linear = isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__
        if linear and name.startswith(within and f"{within}."):
            size = module.nf if isinstance(module, Conv1D) else module.out_features
            if size == width and ".bottleneck_" not in name:
                yield _plain(name)


def _plain(name: str) -> str:
    """The name without adapters."""
    return name.removesuffix(".base_layer")
