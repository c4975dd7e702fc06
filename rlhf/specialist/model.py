"""Load a tokenizer, and a model of transformers with the head of a specialist."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.models.load import load_hf_config
from rlhf.models.vocabulary import check_vocabulary
from rlhf.specialist.head import Batch, Head

MAPPINGS = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""Auto class of transformers -> its mapping from configs to classes."""


def load_text_tokenizer(config: ModelConfig, path: str, head: Head) -> Any:
    """The tokenizer of a model, which pads on the right.

    Raises:
        UserError: There is none, it cannot say which token comes from which word, or it has no token to pad with.
    """
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if head.tuning_task == "tokens":
        options["add_prefix_space"] = True  # byte-level tokenizers would join words that come as a list
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path: {path} has no tokenizer", str(error).split("\n")[0]) from None
    tokenizer.init_kwargs.pop("local_files_only", None)  # else saved with it, though it tells of this process
    if not tokenizer.is_fast:
        raise UserError(
            f"model.path: the tokenizer of {path} has no fast version",
            "Only fast ones say which piece comes from which word or character.",
            "Convert it, or use a model with tokenizer.json.",
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {path} has neither a padding nor an end token to pad with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_specialist(config: ModelConfig, path: str, head: Head, tokenizer: Any) -> tuple[Any, list[str]]:
    """The model in float32 with the labels of `head`, and the names of its new weights, which start at random.

    Dropout stays as the model's config says. A head of another task or other labels is replaced.

    Raises:
        UserError: It cannot be loaded, or transformers has no such head for its family.
    """
    found = load_hf_config(config, path)
    mapping = getattr(transformers, MAPPINGS[head.auto_class])
    if type(found) not in mapping and head.auto_class not in (getattr(found, "auto_map", None) or {}):
        raise UserError(
            f"model.path: transformers has no {head.auto_class.removeprefix('AutoModelFor')} head for "
            f"{found.model_type} models",
            remedy="Use a model of another family, such as BERT, RoBERTa, DeBERTa or ModernBERT.",
        )
    check_vocabulary(config, found, path, len(tokenizer))
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "use_safetensors": True}
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if head.labels:
        options["id2label"] = dict(enumerate(head.labels))
        options["label2id"] = {name: index for index, name in enumerate(head.labels)}
    try:
        model, loading = getattr(transformers, head.auto_class).from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path: {path} cannot be loaded", str(error).split("\n")[0]) from None
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    new = [*loading["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"])]
    return model, new


def train_new_weights(model: Any, new: list[str]) -> None:
    """Also train the weights that start at random, such as a pooler."""
    for name, parameter in model.named_parameters():
        plain = re.sub(r"^base_model\.model\.|base_layer\.|original_module\.", "", name)
        if plain in new and "original_module" not in name:
            parameter.requires_grad_(True)


class Specialist(nn.Module):
    """The model as the engine calls it: float32 logits of a batch."""

    def __init__(self, model: Any, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, batch: Batch) -> Tensor:
        """Logits; see `Head.logits`."""
        return self.head.logits(self.model(**batch.inputs))
