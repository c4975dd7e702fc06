"""The scalar-head model for reward model and critic."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.models.adapters import adapter_has_head, is_adapter, virtual_tokens_of, with_adapter
from rlhf.models.classifiers import classifier_class
from rlhf.models.encoder_decoder import decoder_states, whole_text
from rlhf.models.forward import causal_lm, has_virtual_tokens, hidden_states, is_encoder_decoder, scaled
from rlhf.models.load import HEADS, _load, load_hf_config, refuse_encoder_decoder
from rlhf.models.shared_prompt import (
    NO_SHARING,
    SharedPrompts,
    attention_mask_of,
    completion_ends,
    detect_sharing,
    position_ids_of,
)


class ScalarModel(nn.Module):
    """One number per text (reward model) or per token (critic), from any transformers sequence classifier.

    A decoder is read at the last token that is not padding, an encoder through its own pooling, an encoder-decoder at
    the decoder's last token, with the whole text in both halves (as a critic: the response in the decoder). The number
    is `(head - mean) / std`, where `mean` and `std` are constants in the model's config.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = causal_lm(model).config
        self.is_decoder = hasattr(causal_lm(model), "score")
        """Whether the model has a value for every token."""
        self.mean = float(getattr(config, "reward_mean", 0.0))
        self.std = float(getattr(config, "reward_std", 1.0))

    @property
    def config(self) -> Any:
        return causal_lm(self.model).config

    def token_values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values float32 [B, T] of the tokens int64 [B, T]. Needs a decoder. For the arguments see `hidden_states`."""
        return scaled(self, self.model.score(hidden_states(self.model, input_ids, attention_mask)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor:
        """Scores float32 [B] of the texts int64 [B, T], padded on the right.

        If rows contain several completions of a prompt, `branches` [B, T] marks them (see `rlhf.models.shared_prompt`).
        The scores are then those of the completions, [N], row by row. The model must support `shared_prompts`.
        """
        if is_encoder_decoder(self.model):
            lm: Any = causal_lm(self.model)
            states = decoder_states(self.model, whole_text(lm, input_ids, attention_mask))
            last = states[torch.arange(len(states), device=states.device), attention_mask.sum(-1) - 1]
            return scaled(self, lm.classification_head(last))
        if not self.is_decoder:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return scaled(self, output.logits)
        if branches is None:
            hidden = hidden_states(self.model, input_ids, attention_mask)
            last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        else:
            weights = next(self.parameters())
            sees = attention_mask_of(branches, self.model.config._attn_implementation, weights.dtype)
            last = hidden_states(self.model, input_ids, sees, position_ids_of(branches))[completion_ends(branches)]
        return scaled(self, self.model.score(last))

    @functools.cached_property
    def shared_prompts(self) -> SharedPrompts:
        """How completions can share a row with their prompt; tested on the model once. Every rank calls it."""
        if not self.is_decoder or has_virtual_tokens(self.model):
            # in an encoder the prompt attends to the completion; and `branches` has no virtual tokens
            return NO_SHARING
        training = self.training
        self.eval()
        with torch.no_grad():
            found = detect_sharing(causal_lm(self.model), functools.partial(hidden_states, self.model))
        self.train(training)
        return found

    def set_scale(self, mean: float, std: float) -> None:
        """Set the constants, here and in the config that is saved with the model."""
        self.mean, self.std = mean, std
        self.config.reward_mean, self.config.reward_std = mean, std


def load_scalar(
    config: ModelConfig,
    path: str,
    head: Literal["random", "small", "trained"] = "random",
    tokens: int | None = None,
    as_stored: bool = False,
) -> ScalarModel:
    """A scalar model in float32 from a reward model, a causal LM, an encoder or an encoder-decoder.

    Args:
        config: Loading options.
        path: Model folder or a name on the Hub.
        head: How to initialise a missing head; its bias is zero. `random` is normal with standard deviation
            1 / sqrt(H + 1) (Stiennon et al. 2020, B.1). `small` is normal with standard deviation 0.02, for a critic:
            its first values are near 0, so they add little noise to the first advantages, but its body gets a gradient
            from the first step. `trained` refuses a model without a head.
        tokens: How many ids the model must encode; see `rlhf.models.vocabulary`.
        as_stored: Leave all weights but the head mapped, in the dtype of the file; see `load_policy`.

    Raises:
        UserError: The model cannot be loaded, has no score head, or lacks embedding rows for the ids.
    """
    found = load_hf_config(config, path)
    if virtual_tokens_of(path):
        refuse_encoder_decoder(found, path, "a reward model or critic with virtual tokens does")
    if found.num_labels != 1 and any(name.endswith("ForSequenceClassification") for name in found.architectures or []):
        raise UserError(
            f"{path}: a classifier with {found.num_labels} labels, not a reward model",
            "A score is one number.",
            "Use the model that it was made from, or a classifier with one label.",
        )
    model, loading = _load(
        classifier_class(found, per_token=head == "small"),
        config,
        found,
        path,
        torch.float32,
        tokens,
        as_stored,
        num_labels=1,
        output_loading_info=True,
    )
    scalar = ScalarModel(model)
    layer = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
    if layer is None:
        raise UserError(f"{path}: {type(model).__name__} has no score head; use another model")
    new = any(key.split(".")[0] in HEADS for key in loading["missing_keys"])
    new = new and not (is_adapter(path) and adapter_has_head(path))
    if new and head == "trained":
        raise UserError(f"{path}: has no trained score head", "Its scores would be random.", "Use a reward model.")
    if new and isinstance(layer, nn.Linear):
        with torch.no_grad():
            layer.weight.normal_(std=0.02 if head == "small" else 1 / math.sqrt(layer.in_features + 1))
            if layer.bias is not None:
                layer.bias.zero_()
    if not is_adapter(path):
        return scalar
    scalar = ScalarModel(with_adapter(model, path, "SEQ_CLS"))
    scalar.set_scale(*reward_scale(path))
    return scalar


def reward_scale(path: str | Path) -> tuple[float, float]:
    """Mean and standard deviation that a saved reward model subtracts and divides by."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return float(config.get("reward_mean", 0.0)), float(config.get("reward_std", 1.0))
