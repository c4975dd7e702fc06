"""Classes of models with a score head: transformers' own, or one made from a family's body where there is none."""

from __future__ import annotations

import functools
from typing import Any

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.core.errors import UserError

HEAD_FILE = "score.safetensors"
"""The file with the head's weight [1, H], next to an exported model whose family has no classifier in transformers."""


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier of the config's family, or the model's own code has one."""
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    return remote or type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def classifier_class(config: Any, per_token: bool = False) -> Any:
    """The class whose `from_pretrained` loads a sequence classifier: transformers' auto class, or one of our own.

    An encoder-decoder's classifier reads the whole text with both halves and returns one number; for a value at every
    token of the decoder (`per_token`) the class is always our own.

    Our class is transformers' `GenericForSequenceClassification`, the base of its own classifiers, over the body that
    `AutoModel` returns. `AutoModel` also loads only the body from a folder that such a model was saved in.

    Raises:
        UserError: The family has no body that gives hidden states.
    """
    if has_classifier(config) and not (per_token and config.is_encoder_decoder):
        return AutoModelForSequenceClassification
    if type(config) not in MODEL_MAPPING:
        raise UserError(
            f"model.path: transformers has neither a sequence classifier nor a body of {config.model_type} models",
            "A score head needs hidden states.",
            "Use a model of another family.",
        )
    body: Any = MODEL_MAPPING[type(config)]
    return _over(body[0] if isinstance(body, tuple) else body)


def new_classifier(config: Any, **options: Any) -> Any:
    """A classifier with new weights; `options` are those of transformers' `from_config`."""
    kind = classifier_class(config)
    if kind is AutoModelForSequenceClassification:
        return kind.from_config(config, **options)
    options.pop("trust_remote_code", None)
    return kind._from_config(config, **options)


@functools.cache
def _over(body: Any) -> Any:
    """The class of a family's body with a score head."""
    parent = next(base for base in body.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = body.__name__.removesuffix("Model") + "ForSequenceClassification"
    prefix = parent.base_model_prefix or "model"
    return type(
        name,
        (GenericForSequenceClassification, parent),
        {"base_model_prefix": prefix, "config_class": body.config_class, "__module__": __name__},
    )
