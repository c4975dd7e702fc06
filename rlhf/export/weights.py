"""Writing a run's model as plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.export.types import Exported, Source, base_of
from rlhf.models.load import load_policy
from rlhf.models.save import generation_config
from rlhf.models.scalar import ScalarModel, load_scalar, reward_scale

PAD = "<|pad|>"


def write_policy(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    """Write a causal language model with its generation config and tokenizer."""
    tokenizer = source.chat.tokenizer
    model = load_policy(source.config, str(source.model), dtype or _stored_dtype(source.model))
    model.config.use_cache = True  # it is off for training only
    model.generation_config = generation_config(model, source.chat)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.chat.pad_id)
    tokenizer.padding_side = "left"  # answers begin where prompts end
    _save(model, tokenizer, folder)
    stops = tuple(model.generation_config.eos_token_id)
    return Exported(_name(model.dtype), model.num_parameters(), stop_ids=stops)


def write_reward(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    """Write a sequence classifier with one label and its tokenizer."""
    tokenizer = source.chat.tokenizer
    critic = source.stage == "critic"
    scalar = _merged_critic(source) if critic else load_scalar(source.config, str(source.model), head="trained")
    model, scale = scalar.model, (scalar.mean, scalar.std)
    head = _biased_head(model)
    if head is not None:  # in float32, whatever comes out
        with torch.no_grad():
            head.weight.div_(scalar.std)
            head.bias.sub_(scalar.mean).div_(scalar.std)
        scalar.set_scale(0.0, 1.0)
    if source.chat.pad_id == source.chat.end_id:
        # transformers reads a decoder at the last token that is not padding, which must not be the end of the answer.
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.chat.pad_id)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True  # it is off for training only
    model.config.problem_type = "regression"  # pipelines then leave the number as it is
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    model.to(dtype or _stored_dtype(source.model))
    _save(model, tokenizer, folder)
    return Exported(_name(model.dtype), model.num_parameters(), scale=scale, folded=head is not None)


def _merged_critic(source: Source) -> Any:
    """The critic's adapter and value head in the base that it was trained on, float32."""
    from peft import PeftModel  # slow, and only critics are merged here

    base = load_scalar(source.config, base_of(source.model)).model
    scalar = ScalarModel(PeftModel.from_pretrained(base, source.model).merge_and_unload())
    scalar.set_scale(*reward_scale(source.model))
    return scalar


def _biased_head(model: Any) -> Any:
    """The last linear layer of a classifier, where it has a bias that can take the mean up; None otherwise."""
    head = model.score if hasattr(model, "score") else model.classifier
    linear = [m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return linear[-1] if linear and linear[-1].bias is not None else None


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
