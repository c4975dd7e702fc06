"""The formats of an export: one table, EXPORTERS. `rlhf export --help` reads it, so torch is imported late."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.lazy import torch
from rlhf.core.table import Table
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.adapters import adapter_settings, is_adapter

EXPORTERS = Table("export format")
PAD = "<|pad|>"
BASE = "base_model_name_or_path"
BOTTLENECK_LOADER = "bottleneck_adapter.py"


@dataclass(frozen=True)
class Source:
    """A finished run that is exported."""

    run: Path
    stage: str
    """sft, reward, dpo or ppo; `critic` for the critic of a PPO run."""
    model: Path
    config: ModelConfig
    chat: ChatTokenizer


@dataclass(frozen=True)
class Exported:
    """What an exporter has written."""

    dtype: str
    parameters: int
    stop_ids: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of a reward model's raw scores."""
    folded: bool = False
    """Whether the weights include the scale."""
    adapter_base: str | None = None
    bottleneck: bool = False
    """Whether the adapter is loaded by a file that comes with it instead of PEFT."""
    own_class: bool = False
    """Whether the scalar model's family has no sequence classifier in transformers: body and head load separately."""


@EXPORTERS.row("hf")
def hf(source: Source, folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto") -> Exported:
    """The whole model, adapters merged, in the format of transformers.

    It loads with `AutoModelForCausalLM`, `AutoModelForSeq2SeqLM` or `AutoModelForSequenceClassification`. Where
    transformers has no sequence classifier of the family, `AutoModel` loads the body, and the card says how to add the
    head.

    `dtype` is that of the weights; `auto` leaves them as the run has them.
    """
    kind = adapter_settings(source.model)["peft_type"] if is_adapter(source.model) else None
    if kind == "BOTTLENECK":
        raise UserError(
            f"{source.run}: a bottleneck adapter cannot be merged into a model's weights",
            "It has a nonlinearity.",
            "Export the adapter: --format adapter.",
        )
    if kind is not None and source.stage != "critic":
        raise UserError(
            f"{source.run}: learned virtual tokens cannot be merged into a model's weights",
            "They precede every prompt, and only PEFT adds them.",
            "Export the adapter: --format adapter.",
        )
    write = _write_reward if source.stage in ("reward", "critic") else _write_policy
    return write(source, folder, None if dtype == "auto" else getattr(torch, dtype))


@EXPORTERS.row("adapter")
def adapter(source: Source, folder: Path) -> Exported:
    """The PEFT adapter alone, for `PeftModel.from_pretrained` on the model that it was trained on."""
    from safetensors import safe_open

    from rlhf.models.classifiers import has_classifier
    from rlhf.models.load import load_hf_config
    from rlhf.models.scalar import reward_scale

    places = [source.model] if source.stage == "critic" else [source.run / "adapter", source.model]
    found = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{source.run}: this run has no adapter",
            "Its tuning method changed the model's own weights.",
            "Export the whole model: --format hf.",
        )
    scalar = source.stage in ("reward", "critic")
    if scalar and not has_classifier(load_hf_config(source.config, str(adapter_settings(found)[BASE]))):
        raise UserError(
            f"{source.run}: transformers has no sequence classifier that this adapter could be loaded into",
            remedy="Export the whole model: --format hf.",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(found / name, folder / name)
    settings = adapter_settings(folder)
    bottleneck = settings["peft_type"] == "BOTTLENECK"
    if bottleneck:
        shutil.copyfile(Path(__file__).with_name(BOTTLENECK_LOADER), folder / BOTTLENECK_LOADER)
    source.chat.tokenizer.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 - not a mapping
    return Exported(
        dtype=_name(tensors[0].dtype),
        parameters=sum(tensor.numel() for tensor in tensors),
        stop_ids=(source.chat.end_id,),
        scale=reward_scale(source.model) if scalar else (0.0, 1.0),
        adapter_base=str(settings[BASE]),
        bottleneck=bottleneck,
    )


# ---- whole models ------------------------------------------------------------------------------------------------


def _write_policy(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    """Write a causal language model with its generation config and tokenizer."""
    from rlhf.inference.sampling_params import sampling_params
    from rlhf.models.load import load_policy
    from rlhf.tuning.save import generation_config

    tokenizer = source.chat.tokenizer
    model = load_policy(source.config, str(source.model), dtype or _stored_dtype(source.model))
    model.config.use_cache = True  # it is off for training only
    own = sampling_params(source.run)
    drawn = {"temperature": own.temperature, "top_k": own.top_k, "top_p": own.top_p}
    model.generation_config = generation_config(model, source.chat, do_sample=True, **drawn)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.chat.pad_id)
    if not model.config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # for generation, answers follow the prompts directly
    _save(model, tokenizer, folder)
    stops = tuple(model.generation_config.eos_token_id)
    return Exported(_name(model.dtype), model.num_parameters(), stop_ids=stops)


def _write_reward(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    """Write a sequence classifier with one label and its tokenizer."""
    from safetensors.torch import save_file

    from rlhf.models.classifiers import HEAD_FILE, has_classifier
    from rlhf.models.scalar import load_scalar

    tokenizer = source.chat.tokenizer
    critic = source.stage == "critic"
    scalar = _merged_critic(source) if critic else load_scalar(source.config, str(source.model), head="trained")
    model, scale = scalar.model, (scalar.mean, scalar.std)
    head = _biased_head(model)
    if head is not None:  # in float32, before the cast to the dtype of the export
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
    own_class = not has_classifier(model.config)
    if own_class:
        save_file({"score.weight": model.score.weight.detach().cpu().contiguous()}, folder / HEAD_FILE)
    return Exported(
        _name(model.dtype), model.num_parameters(), scale=scale, folded=head is not None, own_class=own_class
    )


def _merged_critic(source: Source) -> Any:
    """The critic's adapter and value head in the base that it was trained on, float32."""
    from peft import PeftModel

    from rlhf.models.scalar import ScalarModel, load_scalar, reward_scale

    base = load_scalar(source.config, adapter_settings(source.model)[BASE]).model
    scalar = ScalarModel(PeftModel.from_pretrained(base, source.model).merge_and_unload())
    scalar.set_scale(*reward_scale(source.model))
    return scalar


def _biased_head(model: Any) -> Any:
    """The last linear layer of a classifier if it has a bias, which can include the mean; otherwise None."""
    from rlhf.models.load import HEADS

    head = next(getattr(model, name) for name in HEADS if hasattr(model, name))
    linear = [m for m in head.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    return linear[-1] if linear and linear[-1].bias is not None else None


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
