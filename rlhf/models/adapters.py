"""Folders with an adapter instead of a model, because the adapter cannot be merged into the model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError

VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT's types with virtual tokens, which only PEFT's own forward adds."""


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    folder = Path(folder)
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def adapter_settings(folder: str | Path) -> dict[str, Any]:
    """The content of adapter_config.json."""
    found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    return found


def adapter_base(folder: str | Path) -> str | None:
    """The base model of a PEFT adapter folder; None if the folder is not an adapter.

    Raises:
        UserError: The base was a local folder and no longer exists.
    """
    if not is_adapter(folder):
        return None
    base = str(adapter_settings(folder)["base_model_name_or_path"])
    if base.startswith((".", "/", "runs/")) and not (Path(base) / "config.json").is_file():
        raise UserError(
            f"{folder}: the model {base} that this adapter belongs to is not there",
            "An adapter holds only the weights that were added to that model.",
            "Restore that folder, or run the command from the folder where the stage was started.",
        )
    return base


def virtual_tokens_of(folder: str | Path) -> int:
    """Number of positions that the virtual tokens of a folder's adapter use; 0 for any other folder."""
    settings = adapter_settings(folder) if is_adapter(folder) else {}
    return int(settings["num_virtual_tokens"]) if settings.get("peft_type") in VIRTUAL else 0


def with_adapter(model: Any, folder: str | Path, task: str) -> Any:
    """The base with the adapter of a folder, wrapped by PEFT; the model itself if the folder has none.

    Adapter weights are trainable, and those of the base are frozen. The virtual tokens of p-tuning are loaded as prompt
    tuning, since p-tuning's encoder is not saved.

    Args:
        model: The base of the adapter.
        folder: The adapter's folder.
        task: PEFT's task type of `model`. An adapter of a language model fits a classifier, whose head is then new.
    """
    if not is_adapter(folder):
        return model
    import peft
    from safetensors.torch import load_file

    from rlhf.models import bottleneck  # noqa: F401 - registers its method with PEFT

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type in VIRTUAL:
        config = _without_encoder(config)
    config.task_type, config.inference_mode = task, False
    if hasattr(model, "classification_head"):  # which PEFT does not know as a head
        config.modules_to_save = ["classification_head"]
    wrapped = peft.get_peft_model(model, config)
    own = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    if task != "SEQ_CLS":  # the head of a reward model has no place in a language model
        weights = {key: value for key, value in weights.items() if key in own}
    peft.set_peft_model_state_dict(wrapped, own | weights)
    return wrapped


def _without_encoder(config: Any) -> Any:
    """PEFT's config of a folder's virtual tokens without the encoder that computed them in training. PEFT reads their
    width from the model."""
    import peft

    kind = peft.PrefixTuningConfig if config.peft_type == "PREFIX_TUNING" else peft.PromptTuningConfig
    return kind(
        num_virtual_tokens=config.num_virtual_tokens,
        num_transformer_submodules=config.num_transformer_submodules,
        base_model_name_or_path=config.base_model_name_or_path,
    )


def adapter_has_head(folder: str | Path) -> bool:
    """Whether an adapter folder's weights include the head of a classifier."""
    from safetensors import safe_open

    with safe_open(str(Path(folder) / "adapter_model.safetensors"), "pt") as weights:
        heads = (".score.", ".classifier.", ".classification_head.")
        return any(head in key for key in weights.keys() for head in heads)  # noqa: SIM118 - no mapping
