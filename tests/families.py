"""Causal language models of several families, each of 64 tokens and two layers."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}
STATES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
RECURRENT = {
    "lfm2": Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "mamba": MambaConfig(**STATES),
    "falcon_mamba": FalconMambaConfig(**STATES),
    "mamba2": Mamba2Config(**STATES, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
}
"""Families whose layers remember something else than keys and values."""
HYBRID = RECURRENT["lfm2"]
ALIBI = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
"""Bloom: distances instead of positions, so it keeps no packed sequences apart."""
OPT = OPTConfig(
    vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=128,
)  # fmt: skip
"""OPT: learned positions that it counts from the mask where there is one."""


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [3], [20, 21, 22], [9, 8, 7, 6, 5]]
PROMPTS += [[30, 31], [40 + i % 7 for i in range(17)], [17, 33, 50, 12]]


def random_model(config):
    """With weights that are large enough for it not to repeat one token."""
    torch.manual_seed(1)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, 1
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def chat_like(end):
    """What the sampler needs of a ChatTokenizer, for models that have no tokenizer."""
    return SimpleNamespace(end_id=end, pad_id=0, tokenizer=SimpleNamespace(eos_token_id=end), decode=str)


@functools.cache
def by_generate(family):
    """The model, an end token, and what plain `generate` answers to each prompt alone, up to that token.

    The end is the token for which the answers' lengths differ most: early ends and late ones.
    """
    model = random_model((FAMILIES | RECURRENT)[family])
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 24, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    whole = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]

    def until(end):
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]

    end = max(range(VOCAB), key=lambda token: len({len(ids) for ids in until(token)}))
    assert len({len(ids) for ids in until(end)}) >= 3, "answers of unequal lengths are the point"
    return model, end, until(end)
