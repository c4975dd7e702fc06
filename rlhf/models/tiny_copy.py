"""A tiny model of the same architecture: the config with small sizes, and random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

HIDDEN, HEADS, HEAD_DIM, ROTARY = 64, 4, 16, 8
SIZES = (
    (HIDDEN, "hidden_size n_embd d_model word_embed_proj_dim lru_width attention_hidden_size"),
    (HEADS, "num_attention_heads n_head n_heads num_heads"),
    (HEAD_DIM, "head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
               "mamba_head_dim kv_lora_rank q_lora_rank global_head_dim"),
    (HEAD_DIM + ROTARY, "qk_head_dim"),
    (96, "intermediate_size ffn_dim n_inner moe_intermediate_size shared_expert_intermediate_size "
         "shared_intermediate_size expert_ffn_hidden_size ffn_hidden_size block_ff_dim intermediate_size_mlp "
         "moe_shared_expert_intermediate_size prefix_dense_intermediate_size"),
    (ROTARY, "qk_rope_head_dim rotary_dim hidden_size_per_layer_input"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
        "linear_num_value_heads time_step_rank mamba_dt_rank"),
    (2, "num_experts_per_tok moe_k top_k_experts moe_topk linear_num_key_heads attn_layer_period expert_layer_period"),
    (1, "n_group topk_group first_k_dense_replace num_dense_layers n_groups mamba_n_groups num_nextn_predict_layers "
        "moe_num_shared_experts attn_layer_offset expert_layer_offset num_kv_shared_layers"),
)  # fmt: skip
"""Size in a tiny copy -> its names in the configs of model families. A missing or unset name stays so."""
NUMBERS_OF_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
VOCABULARY = ("vocab_size", "vocab_size_per_layer_input")
WINDOW = 16
"""Sliding windows of a tiny copy, so that short texts are longer than them."""
MOST_LAYERS = 4


def tiny_config(config: Any, vocab_size: int | None = None) -> Any:
    """A copy of a model's config with few and narrow layers, one of each kind that the model has (at most four).

    Args:
        config: The transformers config; unchanged.
        vocab_size: The vocabulary of the copy; by default the model's own, since its tokenizer needs it.
    """
    found = copy.deepcopy(config)
    for part in _parts(found):
        _shrink(part, vocab_size)
    return found


def _parts(config: Any) -> Iterator[Any]:
    """The config and those of its parts (text, vision, ...)."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _shrink(config: Any, vocab_size: int | None) -> None:
    known = config.to_dict()
    heads = next((known[name] for name in NUMBERS_OF_HEADS if known.get(name)), None)
    for size, names in SIZES:
        for name in names.split():
            if _is_size(known.get(name)):
                setattr(config, name, size)
    for name in KEY_VALUE_HEADS:
        if _is_size(known.get(name)):
            setattr(config, name, HEADS if known[name] == heads else min(known[name], 2))
    for name in VOCABULARY if vocab_size is not None else ():
        if _is_size(known.get(name)):
            setattr(config, name, vocab_size)
    if "qk_rope_head_dim" in known and "head_dim" in known:  # latent attention: the rotated part
        config.head_dim = ROTARY
    for name in ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention"):
        if _is_size(known.get(name)):
            setattr(config, name, WINDOW)
    _fewer_layers(config, known)
    _recurrent(config, known)
    for parameters in _rope(known):
        _narrow_rope(parameters)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(known.get(name), dict):
            setattr(config, name, known[name])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fewer_layers(config: Any, known: dict[str, Any]) -> None:
    """Keep one layer of each kind, in the model's order."""
    count = next((known[name] for name in LAYERS if _is_size(known.get(name))), None)
    if count is None:
        return
    lists = {name: value for name, value in known.items() if isinstance(value, list) and len(value) == count}
    kinds: dict[Any, int] = {}
    for layer in range(count):
        kinds.setdefault(repr([value[layer] for value in lists.values()]), layer)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    for name, value in lists.items():
        setattr(config, name, [value[layer] for layer in kept])
    for name, value in known.items():  # settings by the number of a layer
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            settings = {int(key): setting for key, setting in value.items()}
            setattr(config, name, {at: settings[layer] for at, layer in enumerate(kept) if layer in settings})
    for name in LAYERS:
        if _is_size(known.get(name)):
            setattr(config, name, len(kept))


def _recurrent(config: Any, known: dict[str, Any]) -> None:
    """Inner widths of state-space layers follow from the hidden size."""
    if "expand" in known and "state_size" in known:
        inner = int(known["expand"] * HIDDEN)
        for name, size in (("intermediate_size", inner), ("num_heads", inner // HEAD_DIM)):
            if name in known:
                setattr(config, name, size)
    if "mamba_expand" in known:
        for name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"):
            if _is_size(known.get(name)) and known[name] > 1:
                setattr(config, name, int(known["mamba_expand"] * HIDDEN) // HEAD_DIM)


def _rope(known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        parameters = known.get(name)
        if isinstance(parameters, dict):
            yield parameters
            yield from (value for value in parameters.values() if isinstance(value, dict))


def _narrow_rope(parameters: dict[str, Any]) -> None:
    pairs = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("long_factor", "short_factor"):
        if isinstance(parameters.get(name), list):
            parameters[name] = parameters[name][:pairs]
    if isinstance(parameters.get("mrope_section"), list):
        parameters["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random float32 weights, so large that outputs show what it attends to."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)
    return model.eval()
