"""Which weights to train: all of them, some of them, or a PEFT adapter. One table, TUNING.

A row takes (model, chat, task): a transformers model, its `ChatTokenizer`, and `causal`, `scalar` (one score,
or a label), `tokens` or `span`. It returns the model with `requires_grad` set, wrapped by PEFT for adapters. Every row
trains the head of a model that is not causal.

Traits: `adapter` (the base does not change, so switching the adapter off restores it), `merges` (the result is a plain
model; otherwise it is the adapter), `prompt_learning` (virtual tokens before the text, which only PEFT's forward adds),
`quantized`, `roles` (adapters of several roles can share one base; see `rlhf.ppo.shared_base`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.core.lazy import nn, peft, torch
from rlhf.core.table import Pick, Table, options_of
from rlhf.tuning.layers import bottleneck_config, go_on, layers_of
from rlhf.tuning.quantization import quant_state, quantize
from rlhf.tuning.virtual_tokens import check_scores, check_takes_keys, first_virtual_tokens

TUNING = Table("tuning method")
Tuning = Annotated[Pick, TUNING]
"""A field of a config that picks a row."""

Dropout = Annotated[float, Field(ge=0, lt=1)]
NameList = Annotated[list[str], Field(min_length=1)]

WHOLE = {"adapter": False, "merges": True, "prompt_learning": False, "quantized": False, "roles": False}
ADAPTER = WHOLE | {"adapter": True}
LORA = ADAPTER | {"roles": True}
PROMPT = ADAPTER | {"merges": False, "prompt_learning": True}
TASKS = {"causal": "CAUSAL_LM", "scalar": "SEQ_CLS", "tokens": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""Our task -> PEFT's task type."""
WEIGHTS_READ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Families whose kernels read the weight of `out_proj` instead of calling the layer, so an adapter would be ignored;
PEFT refuses them by this list."""
HEADS = ("score", "classifier", "classification_head", "qa_outputs")
"""Names of the heads of classifiers, taggers and span extractors in transformers."""


def _row(name: str, **traits: Any) -> Callable[..., Any]:
    """Decorator of a row: the adapter of a model that comes with one is trained further, or the model is refused."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def tune(model: Any, chat: Any, task: str, **options: Any) -> Any:
            if hasattr(model, "peft_config"):
                return go_on(name, model, options)
            if traits["prompt_learning"]:
                check_scores(name, model.config, task)
            return method(model, chat, task, **options)

        return TUNING.row(name, **traits)(tune)

    return decorate


# ---- the model's own weights --------------------------------------------------------------------------------------


@_row("full", **WHOLE)
def full(model: Any, chat: Any, task: str) -> Any:
    """Train all weights."""
    return model.requires_grad_(True)


@_row("last-layers", **WHOLE)
def last_layers(
    model: Any, chat: Any, task: str, *, layers: PositiveInt, embeddings: bool = False, head: bool = True
) -> Any:
    """Train the last `layers` transformer layers, and optionally the head (with the final norm) and the embeddings.

    If the head is tied to the embeddings, training the head trains both.
    """
    model.requires_grad_(False)
    name, last = _last(model, layers)
    for layer in last:
        layer.requires_grad_(True)
    if embeddings:
        model.get_input_embeddings().requires_grad_(True)
    if head:
        siblings = model.get_submodule(name.rpartition(".")[0]).children()
        norms = [module for module in siblings if "norm" in type(module).__name__.lower()]
        for module in filter(None, [*norms, model.get_output_embeddings()]):
            module.requires_grad_(True)
    return _train_head(model, task)


def _last(model: Any, count: int) -> tuple[str, Any]:
    """Name of the list of transformer layers, and the last `count` layers."""
    name, stack = layers_of(model)
    if count > len(stack):
        raise UserError(f"tuning.layers: {count} is more than the {len(stack)} layers of {type(model).__name__}")
    return name, stack[-count:]


@_row("modules", **WHOLE)
def modules(model: Any, chat: Any, task: str, *, names: NameList) -> Any:
    """Train the parameters whose full name matches one of the regular expressions `names`."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for pattern in names:
        try:
            matches = [name for name in parameters if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"tuning.names: {pattern!r} is not a regular expression: {error}") from None
        if not matches:
            some = ", ".join(list(parameters)[:: max(1, len(parameters) // 6)][:6])
            raise UserError(f"tuning.names: {pattern!r} matches no parameter", f"Some parameter names: {some}")
        for name in matches:
            parameters[name].requires_grad_(True)
    return _train_head(model, task)


def _train_head(model: Any, task: str) -> Any:
    if task != "causal":
        for name in HEADS:
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)
    return model


# ---- adapters in the layers ----------------------------------------------------------------------------------------


def _for_task(model: Any, task: str, heads: bool = True) -> dict[str, Any]:
    """PEFT's task type, and with `heads` the names of heads that it neither leaves out nor trains by itself."""
    kind = "SEQ_2_SEQ_LM" if task == "causal" and model.config.is_encoder_decoder else TASKS[task]
    return {"task_type": kind} | ({"modules_to_save": _own_heads(model, task) or None} if heads else {})


def _own_heads(model: Any, task: str) -> list[str]:
    return ["classification_head"] if task == "scalar" and hasattr(model, "classification_head") else []


def _linears_of_head(model: Any, task: str) -> list[str]:
    """Names of the linear layers in heads that `all-linear` would adapt; PEFT leaves those of `scalar` out itself."""
    heads = HEADS if task in ("tokens", "span") else _own_heads(model, task)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name.partition(".")[0] in heads]


def lora_config(
    model: Any,
    task: str,
    *,
    rank: PositiveInt = 16,
    alpha: PositiveInt = 32,
    dropout: Dropout = 0.0,
    target_modules: str | NameList = "all-linear",
    layers: PositiveInt | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> Any:
    """PEFT's config for the options of `lora` or `qlora`, for a model without adapters."""
    return peft.LoraConfig(
        exclude_modules=[*_left_out(model, target_modules), *_linears_of_head(model, task)] or None,
        **_for_task(model, task), r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=dora,
        target_modules=target_modules if layers is None else _targets_in_last(model, layers, target_modules),
    )  # fmt: skip


def _left_out(model: Any, targets: str | list[str]) -> list[str]:
    """Names of the linear layers that `all-linear` leaves out."""
    # A router is a linear layer that returns several tensors in some families (PhiMoE), which LoRA cannot extend.
    linears = [(name, type(module)) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name, kind in linears if "Router" in kind.__name__]
    if targets == "all-linear" and model.config.model_type in WEIGHTS_READ:
        found += ["out_proj", "conv1d"]
    return found


@_row("lora", **LORA)
@options_of(lora_config)
def lora(model: Any, chat: Any, task: str, **options: Any) -> Any:
    """Low-rank updates of linear layers (Hu et al. 2021).

    `target_modules` is `all-linear` (all but the head, and but `out_proj` of Mamba's families), a regular expression,
    or a list of names. `layers` restricts the adapter to that many of the last transformer layers. `rslora` scales
    updates by 1/sqrt(rank), `dora` also trains magnitudes.
    """
    return _wrap("lora", model, lora_config(model, task, **options))


def _targets_in_last(model: Any, layers: int, targets: str | list[str]) -> list[str]:
    """Full names of the target modules in the last layers. (PEFT cannot combine the two options.)"""
    from transformers.pytorch_utils import Conv1D

    def is_target(path: str, module: Any) -> bool:
        if targets == "all-linear":
            return isinstance(module, (nn.Linear, Conv1D))
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in targets)

    inside = {module for layer in _last(model, layers)[1] for module in layer.modules()}
    found = [path for path, module in model.named_modules() if module in inside and is_target(path, module)]
    if not found:
        raise UserError(f"tuning.target_modules: {targets!r} matches nothing in the last {layers} layers")
    return found


@_row("ia3", **ADAPTER)
def ia3(
    model: Any,
    chat: Any,
    task: str,
    *,
    target_modules: NameList | None = None,
    feedforward_modules: NameList | None = None,
) -> Any:
    """Learned scales on keys, values and feed-forward activations (Liu et al. 2022).

    PEFT knows the modules of common model families. For others, list them in `target_modules`, and also list those
    whose input (not output) is scaled in `feedforward_modules`.
    """
    config = peft.IA3Config(
        **_for_task(model, task), target_modules=target_modules, feedforward_modules=feedforward_modules
    )
    return _wrap("ia3", model, config)


@_row("qlora", **LORA | {"quantized": True})
@options_of(lora_config, without=("dora",))
def qlora(model: Any, chat: Any, task: str, **options: Any) -> Any:
    """LoRA on a base in 4-bit NormalFloat with double quantisation (Dettmers et al. 2023). Needs a GPU.

    The merged result is the dequantised base plus the update, the same function that was trained.
    """
    if not torch.cuda.is_available():
        raise UserError("tuning: qlora needs a CUDA device", "Its 4-bit kernels run only there.", "Use `lora`.")
    quantize(model, torch.device("cuda"), torch.bfloat16)
    return lora(model, chat, task, **options)


def _wrap(name: str, model: Any, config: Any) -> Any:
    try:
        wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"tuning: {name} does not work with {type(model).__name__}",
            str(error).split("\n")[0],
            "Name other layers in tuning.target_modules, or use `full` or `last-layers`.",
        ) from None
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and _is_adapted(wrapped.get_output_embeddings()):
        raise UserError(
            "tuning.target_modules: the head cannot have an adapter",
            "Log-probs are computed from the weight of the head, so the adapter would be ignored.",
            "Leave it out, as `all-linear` does.",
        )
    if model.config.get_text_config().tie_word_embeddings and _is_adapted(wrapped.get_input_embeddings()):
        raise UserError(
            "tuning.target_modules: the embeddings of this model are tied to its head",
            "A merged model cannot have changed embeddings and an unchanged head.",
            "Leave them out, as `all-linear` does.",
        )
    return wrapped


def _is_adapted(module: Any) -> bool:
    return type(module).__module__.startswith("peft.")


@_row("bottleneck", **ADAPTER | {"merges": False, "roles": True})
@options_of(bottleneck_config)
def bottleneck_adapters(model: Any, chat: Any, task: str, **options: Any) -> Any:
    """A small network after parts of each layer: down to `size`, an activation, up again, added to the part's output.

    `placement` is `pfeiffer` (after the MLP; Pfeiffer et al. 2021) or `houlsby` (after the attention too; Houlsby et
    al. 2019). `size` is the model's width divided by `reduction` if it is not given. `layers` restricts adapters to
    that many of the last transformer layers. At the start they change nothing. They cannot be merged into the weights.
    """
    return _wrap("bottleneck", model, adapter_config(TUNING.pick({"name": "bottleneck", **options}), model, task))


def adapter_config(tuning: Pick, model: Any, task: str) -> Any:
    """PEFT's config for a row with the trait `roles`, for a model without adapters."""
    if tuning.name != "bottleneck":
        return lora_config(model, task, **tuning.options)
    config = bottleneck_config(model, **tuning.options)
    for name, value in _for_task(model, task).items():
        setattr(config, name, value)
    return config


# ---- virtual tokens ------------------------------------------------------------------------------------------------


@_row("prompt-tuning", **PROMPT)
def prompt_tuning(
    model: Any,
    chat: Any,
    task: str,
    *,
    tokens: PositiveInt = 20,
    init: Literal["random", "vocabulary", "text", "labels"] = "random",
    text: str | None = None,
    labels: NameList | None = None,
) -> Any:
    """Learned embeddings before the text (Lester et al. 2021).

    `init` is their initialisation: `random` (normal, with mean and standard deviation of the word embeddings), random
    tokens of the `vocabulary`, the tokens of `text` (repeated if too short), or class `labels`: one virtual token per
    label, the mean of its tokens, and the rest from the vocabulary (section 3.2).
    """
    for option, value in (("text", text), ("labels", labels)):
        if (init == option) != (value is not None):
            raise UserError(f"tuning.{option}: set it if and only if init is `{option}` (init is `{init}`)")
    words = model.get_input_embeddings().weight.detach().float()
    with torch.no_grad():
        start = first_virtual_tokens(words, chat, tokens, init, text, labels)
    kind = _for_task(model, task, heads=False)
    config = peft.PromptTuningConfig(**kind, num_virtual_tokens=tokens, num_transformer_submodules=1)
    wrapped = _wrap("prompt-tuning", model, config)
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(start)
    return wrapped


@_row("p-tuning", **PROMPT)
def p_tuning(
    model: Any,
    chat: Any,
    task: str,
    *,
    tokens: PositiveInt = 20,
    encoder: Literal["mlp", "lstm"] = "mlp",
    hidden: PositiveInt | None = None,
) -> Any:
    """Virtual tokens from a small encoder of width `hidden`, by default the model's width (Liu et al. 2021)."""
    config = peft.PromptEncoderConfig(
        **_for_task(model, task, heads=False), num_virtual_tokens=tokens, num_transformer_submodules=1,
        encoder_reparameterization_type=encoder.upper(), encoder_dropout=0.0,
        encoder_hidden_size=hidden,  # type: ignore[arg-type]
    )  # fmt: skip
    return _wrap("p-tuning", model, config)


@_row("prefix-tuning", **PROMPT)
def prefix_tuning(
    model: Any,
    chat: Any,
    task: str,
    *,
    tokens: PositiveInt = 20,
    projection: bool = False,
    hidden: PositiveInt | None = None,
) -> Any:
    """Learned keys and values before the text in every layer (Li & Liang 2021).

    Without `projection` this is P-tuning v2 (Liu et al. 2022); with it they come from an MLP of width `hidden`.
    """
    check_takes_keys(model)
    config = peft.PrefixTuningConfig(
        **_for_task(model, task, heads=False), num_virtual_tokens=tokens, prefix_projection=projection,
        encoder_hidden_size=hidden,  # type: ignore[arg-type]
    )  # fmt: skip
    return _wrap("prefix-tuning", model, config)


def virtual_tokens(tuning: Pick) -> int:
    """Number of positions that the virtual tokens of a tuning method use."""
    return int(tuning.options["tokens"]) if tuning.row.traits["prompt_learning"] else 0


# ---- report --------------------------------------------------------------------------------------------------------


def say_trainable(tuning: Pick, model: Any) -> None:
    """Print the numbers of trainable and of all parameters. 4-bit and partitioned parameters count in full."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        size *= 2 if quant_state(parameter) is not None else 1  # a byte holds two weights
        total += size
        trained += size * parameter.requires_grad
    options = ", ".join(f"{key} {value}" for key, value in tuning.options.items() if value not in (None, False))
    method = f"{tuning.name} ({options})" if options else tuning.name
    say(f"Tuning: {method}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
