"""Load models, without dropout, and read their limits from their configs."""

from __future__ import annotations

import os
import types
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.models.adapters import adapter_base, with_adapter
from rlhf.models.encoder_decoder import decoder_states, divided
from rlhf.models.forward import head_logits, hidden_states, is_encoder_decoder
from rlhf.models.mapped import computing, prepare, stored_dtypes
from rlhf.models.vocabulary import add_rows, check_vocabulary

HEADS = ("score", "classifier", "classification_head")
"""Names of the head of transformers' sequence classifiers: decoders, encoders, encoder-decoders."""

POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "xmod"}
"""Model families whose first token has position pad_token_id + 1, which leaves fewer positions."""


def quiet() -> None:
    """Silence the libraries' loading messages, so that standard output holds only results."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Position ids are not supported")  # prompt tuning: virtual tokens have none
    if not torch.cuda.is_available():  # DeepSpeed, imported by transformers, would print that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """The compute dtype for `auto`, `float32` or `bfloat16`."""
    if precision == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def load_hf_config(config: ModelConfig, path: str) -> transformers.PretrainedConfig:
    """The Hugging Face config of a model, without its weights.

    Raises:
        UserError: There is no model, or it needs its own code while trust_remote_code is off.
    """
    if not (Path(path) / "config.json").is_file():
        path = adapter_base(path) or path
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a value of the wrong type in config.json raises whatever the family's code runs into
        why = str(error).split("\n")[0]
        raise UserError(f"model.path: no model can be loaded from {path}", why, _hub_remedy(path)) from None
    return found


def _hub_remedy(path: str) -> str:
    if Path(path).exists():
        return ""
    return (
        "Check the name. Where the hub cannot be reached: `hf download NAME --local-dir FOLDER` on a machine that"
        " reaches it, copy the folder here, and name it."
    )


def sequence_limit(config: ModelConfig, found: transformers.PretrainedConfig) -> int:
    """The longest sequence in tokens: max_length of the config, or else the positions of the model.

    Raises:
        UserError: max_length is more than the positions of the model.
    """
    positions = getattr(found, "max_position_embeddings", None) or getattr(found, "n_positions", None) or 2**20
    if found.model_type in POSITIONS_AFTER_PADDING:
        positions -= found.pad_token_id + 1
    if config.max_length is not None and config.max_length > positions:
        raise UserError(
            f"model.max_length: {config.max_length} is more than the {positions} positions of the model",
            remedy=f"Set model.max_length to {positions} or less.",
        )
    return config.max_length or positions


def load_policy(
    config: ModelConfig,
    path: str,
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
    as_stored: bool = False,
) -> PreTrainedModel:
    """A causal language model or an encoder-decoder in `dtype`, dropout off.

    It encodes `tokens` ids (see `rlhf.models.vocabulary`). With `as_stored` its weights stay mapped, in the dtype of
    the file, for an engine that casts them (see `rlhf.models.mapped`).

    From the folder of an adapter that cannot be merged it is the base with the adapter, wrapped by PEFT.

    Raises:
        UserError: It cannot be loaded, its log-probs would be wrong, or it lacks embedding rows for the ids.
    """
    found = load_hf_config(config, path)
    kind = AutoModelForSeq2SeqLM if found.is_encoder_decoder else AutoModelForCausalLM
    model = _load(kind, config, found, path, dtype, tokens, as_stored)
    with computing(model):
        check_head(model)
    wrapped: PreTrainedModel = with_adapter(model, path, "SEQ_2_SEQ_LM" if found.is_encoder_decoder else "CAUSAL_LM")
    return wrapped


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not its head applied to its last hidden states.

    Raises:
        UserError: The two differ, so log-probs would be wrong.
    """
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    if is_encoder_decoder(model):
        parts = divided(model, ids, mask, mask.cumsum(-1) > 4)
        whole = model(
            input_ids=parts.encoder_ids, attention_mask=parts.encoder_mask, decoder_input_ids=parts.decoder_ids
        )
        expected, states = whole.logits[0].float(), decoder_states(model, parts)[0]
    else:
        expected = model(input_ids=ids, attention_mask=mask).logits[0].float()
        states = hidden_states(model, ids, mask)[0]
    found = head_logits(model, states)
    model.train(training)
    if not torch.allclose(expected, found, atol=1e-2 * float(expected.abs().max()) + 1e-4):
        raise UserError(
            f"{type(model).__name__}: its logits are not its output embedding times its last hidden states",
            "The log-probs that PPO needs would be wrong for this architecture.",
            "Use a model of another family (Llama, Qwen, Mistral, Gemma, GPT-2, OPT, ... are known to work).",
        )


def _load(
    kind: Any,
    config: ModelConfig,
    found: transformers.PretrainedConfig,
    path: str,
    dtype: torch.dtype,
    tokens: int | None,
    as_stored: bool,
    **more: Any,
) -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it warns at length about every new head
    path = adapter_base(path) or path
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"model.path: {path} holds a model and an adapter (adapter_config.json)",
            "transformers would take the weights from the adapter's base, not from this folder.",
            "Remove adapter_config.json to use the folder's own weights, or merge the adapter first.",
        )
    if tokens is not None:
        check_vocabulary(config, found, path, tokens)
    options = {"trust_remote_code": config.trust_remote_code, "use_safetensors": True, "dtype": dtype, **more}
    # T5's position bias is trained, and is added as a mask: torch's fused attention then uses different kernels with
    # and without gradients, so PPO's first ratio would not be 1.
    default = "eager" if hasattr(found, "relative_attention_num_buckets") and found.is_encoder_decoder else None
    if config.attn_implementation or default:
        options["attn_implementation"] = config.attn_implementation or default
    try:
        with stored_dtypes() if as_stored else nullcontext():
            loaded = kind.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path: {path} cannot be loaded", str(error).split("\n")[0]) from None
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config.use_cache = False
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # an auxiliary loss that no stage uses, and a forward that fails
        text.output_router_logits = False
    if as_stored:
        prepare(model, dtype, HEADS)
    if tokens is not None:
        add_rows(model, tokens, dtype)
    for module in model.modules():
        # Without dropout the same input gives the same log-probs, so the first PPO ratio is 1. Some families (OPT) keep
        # the dropout probability as an attribute and call the function.
        names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in names:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
        if any("jitter" in name for name in vars(module)):  # routers that draw noise in training mode (PhiMoE, Mixtral)
            module.eval()
            module.train = types.MethodType(_stay_in_eval, module)
    return loaded


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def refuse_encoder_decoder(found: Any, path: str, what: str) -> None:
    """Refuse an encoder-decoder, by its Hugging Face config, where `what` does not support it.

    Raises:
        UserError: It is one.
    """
    if found.is_encoder_decoder:
        raise UserError(
            f"model.path: {path} is an encoder-decoder ({found.model_type}), which {what} not support",
            "Its encoder reads the prompt and its decoder the answer.",
            "Use a decoder (Llama, Qwen, ...).",
        )


def recompute_activations(model: Any, **options: Any) -> None:
    """Turn on gradient checkpointing with torch's options, in old and new versions of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters. Parameters partitioned by ZeRO-3 count in full."""
    sizes = [(p, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(n for p, n in sizes if p.requires_grad), sum(n for _, n in sizes)
