"""Save the result of a run: merged weights, tokenizer, generation config, adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from rlhf.core.console import is_main
from rlhf.core.table import Pick
from rlhf.data.chat_tokenizer import stop_ids
from rlhf.tuning import merging
from rlhf.tuning.shards import save_weights


def save_result(path: Path, model: Any, chat: Any, tuning: Pick) -> None:
    """Save the result of a run in `path`, the run folder. Every rank calls it.

    `model/` is the merged model in Hugging Face format with tokenizer, chat template, and a generation config with the
    end tokens. A mergeable adapter is also saved separately, in `adapter/`. If the adapter cannot be merged (virtual
    tokens, bottleneck adapters), `model/` is the adapter; with a score head also the classifier's config, which has the
    scale of the scores.

    Args:
        model: A transformers model, wrapped by PEFT if `tuning` is an adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    folder = path / "model"
    if base.can_generate():
        base.generation_config = generation_config(base, chat)  # the base's own may be one that cannot be saved
    if is_main():
        for old in (folder, path / "adapter"):
            shutil.rmtree(old, ignore_errors=True)
    merges = tuning.row.traits["merges"]
    if tuning.row.traits["adapter"]:
        _save_adapter(path / "adapter" if merges else folder, model)
    if merges:
        base.config.use_cache = True  # it is off only during training
        save_weights(folder, model)
        base.config.use_cache = False
    elif is_main() and not base.can_generate():
        base.config.save_pretrained(folder)
    if is_main():
        chat.tokenizer.save_pretrained(folder)
        if base.can_generate():
            base.generation_config.save_pretrained(folder)


def _save_adapter(folder: Path, model: Any) -> None:
    model.peft_config["default"].base_model_name_or_path = origin_of(model)
    with merging.gathered([p for p in model.parameters() if p.requires_grad]):
        if is_main():
            model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])


def origin_of(model: Any) -> str:
    """Where the base model of an adapter was loaded from: an absolute path, or a name on the Hub."""
    source = Path(str(model.get_base_model().name_or_path))
    return str(source.resolve()) if source.is_dir() else str(source)


def generation_config(model: Any, chat: Any, **sampling: Any) -> Any:
    """A generation config with the end tokens of rollouts, the padding token of `chat` and these sampling options.

    Of the base's own config only the end tokens are kept: no stage samples with its temperature or penalties.
    """
    ends, bos = stop_ids(model, chat), chat.tokenizer.bos_token_id
    start = getattr(model.config, "decoder_start_token_id", None)  # of encoder-decoders
    config = GenerationConfig(
        eos_token_id=ends, pad_token_id=chat.pad_id, bos_token_id=bos, decoder_start_token_id=start, **sampling
    )
    config._from_model_config = False  # else loading it takes the end token from config.json
    return config
