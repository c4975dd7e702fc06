"""Models: loading, the scalar head that reward model and critic share, and log-probs without full logits."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf import distributed
from rlhf.config import ModelConfig
from rlhf.errors import UserError
from rlhf.packed_attention import PACKED, sizes_of
from rlhf.shared_prompt import ALONE, SharedPrompts, attention_of, ends_of, positions_of, sharing_of

HEAD_CHUNK_ELEMENTS = 2**24
"""Most logits that are held at a time: 64 MiB in float32."""
HEAD_CHUNK_ELEMENTS_GPU = 2**27
"""The same on a GPU, 512 MiB: each part reads the head's weights and adds to their gradient, whatever its size."""

POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "xmod"}
"""Families whose first token has the position after that of padding, so that fewer positions are left."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of the computation for `auto`, `float32` or `bfloat16`."""
    if precision == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def load_config(config: ModelConfig, path: str) -> transformers.PretrainedConfig:
    """The Hugging Face config of a model, without its weights.

    Raises:
        UserError: No model there, or one that needs its own code while trust_remote_code is off.
    """
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model.path: {path} is an adapter that cannot be merged, not a model of its own",
            "Virtual tokens (prompt tuning and its kin) live outside the weights; the next stages train weights.",
            "Start from an SFT run with `tuning: full` or `lora`.",
        )
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: no model can be loaded from {path}", str(error).split("\n")[0]) from None
    return found


def sequence_limit(config: ModelConfig, found: transformers.PretrainedConfig) -> int:
    """The longest sequence in tokens: the config's, bounded by the model's positions.

    Raises:
        UserError: The config asks for more than the model has.
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


def load_policy(config: ModelConfig, path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in `dtype`, dropout off."""
    model = _load(AutoModelForCausalLM, config, path, dtype)
    check_head(model)
    return model


def _load(kind: Any, config: ModelConfig, path: str, dtype: torch.dtype, **more: Any) -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # or it warns at length of every new head
    load_config(config, path)
    options = {"trust_remote_code": config.trust_remote_code, "use_safetensors": True, "dtype": dtype, **more}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    try:
        loaded = kind.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path: {path} cannot be loaded", str(error).split("\n")[0]) from None
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config.use_cache = False
    for module in model.modules():
        # Dropout off: the same input gives the same log-probs, so the PPO ratio starts at 1. Some families (OPT) keep
        # its probability as a number and call the function.
        names = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        for name in names:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
    return loaded


def recompute_activations(model: Any, **options: Any) -> None:
    """Gradient checkpointing of a transformers model, whatever its version calls it, with torch's options."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


# ---- log-probs ---------------------------------------------------------------------------------------------------


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states [B, T, H] of a causal LM (adapters included), without its logits.

    Rows are padded on the right. Where `position_ids` [B, T] are given, `attention_mask` says which token sees which
    (see `rlhf.shared_prompt`), or is None where positions from 0 keep packed sequences apart (see `rlhf.packing`).
    """
    lm = causal_lm(model)
    body = getattr(lm, lm.base_model_prefix)
    positions = {} if position_ids is None else {"position_ids": position_ids}
    if position_ids is None and _is_causal(body):
        attention_mask = None  # tokens see only what stands before them, never the padding: faster without a mask
    elif position_ids is not None and attention_mask is None and body.config._attn_implementation == PACKED:
        attention_mask = sizes_of(position_ids)[None, None, None]
    output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
    return output.last_hidden_state


def _is_causal(body: nn.Module) -> bool:
    """What the model's attention says of itself; False where it says nothing."""
    return next((bool(module.is_causal) for module in body.modules() if hasattr(module, "is_causal")), False)


def head_chunks(tokens: int, vocab_size: int) -> int:
    """In how many parts the head works on so many tokens. Under ZeRO-3 all ranks must use the same number."""
    elements = HEAD_CHUNK_ELEMENTS_GPU if distributed.device().type == "cuda" else HEAD_CHUNK_ELEMENTS
    return max(1, math.ceil(tokens * vocab_size / elements))


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    response_mask: Tensor,
    temperature: float,
    chunks: int | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens alone; full logits exist for one chunk of tokens at a time.

    Args:
        model: A causal LM, or PEFT's wrapper around one.
        input_ids: int64 [B, T], prompt and response, padded on the right.
        attention_mask: [B, T], 1 where there is a token; None where packed.
        response_mask: bool [B, T], True at the response tokens (never the first of a sequence).
        temperature: Logits are divided by it, as they were when sampling.
        chunks: Parts that the head works in; chosen by the number of tokens when left out.
        position_ids: Of packed sequences; see `hidden_states`.

    Returns:
        float32 [n] log-probs and [n] entropies in nats, n = response_mask.sum(), row by row.
    """
    hidden = hidden_states(model, input_ids, attention_mask, position_ids)
    predicts = response_mask[:, 1:]
    return head_logprobs(causal_lm(model), hidden[:, :-1][predicts], input_ids[:, 1:][predicts], temperature, chunks)


def head_logprobs(
    lm: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, chunks: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [n] of `targets` [n] and entropies [n] from hidden states [n, H]; see `token_logprobs`."""
    chunks = chunks or head_chunks(len(targets), lm.config.get_text_config().vocab_size)

    def part(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return _Chosen.apply(_logits(lm, states), wanted, temperature)

    parts = []
    for states, wanted in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks)):
        if torch.is_grad_enabled():  # the backward pass computes the chunk's logits again instead of keeping them
            parts.append(checkpoint(part, states, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(part(states, wanted))
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


class _Chosen(torch.autograd.Function):
    """Log-probs of tokens, and entropies, from logits [n, V], which it overwrites: with them, forward and backward hold
    two such matrices at a time, three where the loss has an entropy bonus.

    With log-probs l, p = exp(l), temperature T and entropy H: d l_i / d logit_j = (1[i=j] - p_j) / T and
    d H / d logit_j = -p_j (l_j + H) / T.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature != 1:
            logits /= temperature
        logprobs = torch.log_softmax(logits, -1, out=logits)
        chosen = logprobs.gather(-1, wanted[:, None]).squeeze(-1)
        entropies = -logprobs.exp().mul_(logprobs).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        ctx.save_for_backward(logprobs, wanted, entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, chosen: Tensor | None, entropies: Tensor | None) -> tuple[Tensor, None, None]:
        logprobs, wanted, entropy = ctx.saved_tensors
        gradient = logprobs.exp()
        weight = gradient.new_zeros(len(gradient)) if chosen is None else chosen / ctx.temperature
        if entropies is None:
            gradient *= -weight[:, None]
        else:
            bonus = (logprobs + entropy[:, None]).mul_((entropies / ctx.temperature)[:, None])
            gradient *= bonus.add_(weight[:, None]).neg_()
        return gradient.scatter_add_(-1, wanted[:, None], weight[:, None]), None, None


def _logits(lm: PreTrainedModel, states: Tensor) -> Tensor:
    """float32 logits as the model's own forward gives them, scaling and soft cap of the family included."""
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    logits = head(states).float()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not its head on its last hidden states.

    Raises:
        UserError: The two differ, so log-probs would be wrong.
    """
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    expected = model(input_ids=ids, attention_mask=mask).logits[0].float()
    found = _logits(model, hidden_states(model, ids, mask)[0])
    model.train(training)
    if not torch.allclose(expected, found, atol=1e-2 * float(expected.abs().max()) + 1e-4):
        raise UserError(
            f"{type(model).__name__}: its logits are not its output embedding times its last hidden states",
            "The log-probs that PPO needs would be wrong for this architecture.",
            "Use a model of another family (Llama, Qwen, Mistral, Gemma, GPT-2, OPT, ... are known to work).",
        )


# ---- scalar head -------------------------------------------------------------------------------------------------


class ScalarModel(nn.Module):
    """One number per text (reward model) or per token (critic), from any transformers sequence classifier.

    Decoders are read at the last real token, whatever the padding token is; encoders through their own pooling. The
    number is `(head - mean) / std`, `mean` and `std` being constants of the checkpoint.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = causal_lm(model).config
        self.mean = float(getattr(config, "reward_mean", 0.0))
        self.std = float(getattr(config, "reward_std", 1.0))

    @property
    def config(self) -> Any:
        return causal_lm(self.model).config

    @property
    def is_decoder(self) -> bool:
        """True where every token has a value of its own."""
        return hasattr(causal_lm(self.model), "score")

    def token_values(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Values float32 [B, T] of every token of int64 [B, T]. Needs a decoder. Arguments of `hidden_states`."""
        head = causal_lm(self.model).score
        hidden = hidden_states(self.model, input_ids, attention_mask, position_ids)
        return self._scale(head(hidden).squeeze(-1).float())  # type: ignore[operator]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor:
        """Scores float32 [B] of the texts int64 [B, T], padded on the right.

        Where rows hold several answers to a prompt, `branches` [B, T] says so (see `rlhf.shared_prompt`), and the
        scores are those [N] of the answers, row by row. Needs a model that has `shared_prompts`.
        """
        if not self.is_decoder:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return self._scale(output.logits.squeeze(-1).float())
        if branches is None:
            hidden = hidden_states(self.model, input_ids, attention_mask)
            last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        else:
            weights = next(self.parameters())
            sees = attention_of(branches, self.config._attn_implementation, weights.dtype)
            last = hidden_states(self.model, input_ids, sees, positions_of(branches))[ends_of(branches)]
        return self._scale(causal_lm(self.model).score(last).squeeze(-1).float())  # type: ignore[operator]

    @functools.cached_property
    def shared_prompts(self) -> SharedPrompts:
        """Whether several answers can share a row with their prompt; tried out once. Every rank asks together."""
        if not self.is_decoder:
            return ALONE  # an encoder's prompt looks at the answer
        training = self.training
        self.eval()
        with torch.no_grad():
            found = sharing_of(causal_lm(self.model), functools.partial(hidden_states, self.model))
        self.train(training)
        return found

    def _scale(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def set_scale(self, mean: float, std: float) -> None:
        """Change the constants, here and in the config that is saved with the model."""
        self.mean, self.std = mean, std
        self.config.reward_mean, self.config.reward_std = mean, std


def load_scalar(config: ModelConfig, path: str, head: Literal["random", "small", "trained"] = "random") -> ScalarModel:
    """A scalar model in float32 from a reward model, a causal LM or an encoder.

    Args:
        config: How to load it.
        path: Model folder or hub name.
        head: What a missing head becomes. `random` is normal with standard deviation 1 / sqrt(H + 1) from torch's
            generator (Stiennon 2020, B.1), bias zero. `small`, of standard deviation 0.02, is for a
            critic: its first values are near 0, so they are little noise in the first advantages, and yet its body
            gets a gradient from the first step. `trained` refuses.

    Raises:
        UserError: No such model, or one without a head that gives a score.
    """
    model, loading = _load(
        AutoModelForSequenceClassification, config, path, torch.float32, num_labels=1, output_loading_info=True
    )
    scalar = ScalarModel(model)
    layer = model.score if scalar.is_decoder else getattr(model, "classifier", None)
    if layer is None:
        raise UserError(f"{path}: {type(model).__name__} has no head that gives a score; use another model")
    new = any(key.split(".")[0] in ("score", "classifier") for key in loading["missing_keys"])
    if new and head == "trained":
        raise UserError(f"{path}: has no trained score head", "Its scores would be random.", "Name a reward model.")
    if new and isinstance(layer, nn.Linear):
        with torch.no_grad():
            layer.weight.normal_(std=0.02 if head == "small" else 1 / math.sqrt(layer.in_features + 1))
            if layer.bias is not None:
                layer.bias.zero_()
    return scalar


def reward_scale(path: str | Path) -> tuple[float, float]:
    """Mean and standard deviation that a saved reward model subtracts and divides by."""
    config = json.loads((Path(path) / "config.json").read_text("utf-8"))
    return float(config.get("reward_mean", 0.0)), float(config.get("reward_std", 1.0))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; parameters that ZeRO-3 has partitioned count in full."""
    sizes = [(p, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(n for p, n in sizes if p.requires_grad), sum(n for _, n in sizes)
