"""Virtual tokens while decoding: keys and values before every prompt, computed once from the live weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.models.attention import plain_attention
from rlhf.models.forward import causal_lm
from rlhf.rollout.kv_cache import joinable


class VirtualTokens:
    """The virtual tokens of a decoder in PEFT's wrapper, the same for all requests (`types.RowAdapters`)."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        """
        Args:
            model: A model for which `has_virtual_tokens` is true, with its full weights on this process.

        Raises:
            UserError: The model keeps no key and value per token.
        """
        lm: Any = causal_lm(model)
        if not joinable(lm):
            raise UserError(
                f"tuning: completions with virtual tokens do not work with {lm.config.model_type} models",
                "Virtual tokens are keys and values in the cache, and these models keep none for each token.",
                "Use lora, ia3, bottleneck, last-layers or full.",
            )
        with plain_attention(lm):
            learned = model.get_prompt(batch_size=1)
            if isinstance(learned, Tensor):  # embeddings; prefix tuning gives the cache itself
                cache: Any = transformers.DynamicCache()
                words = learned.to(lm.get_input_embeddings().weight.dtype)
                lm(inputs_embeds=words, past_key_values=cache, use_cache=True, logits_to_keep=1)
                learned = cache
        self.count: int = model.active_peft_config.num_virtual_tokens
        self.layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in learned.layers]
        """Keys and values [1, heads, count, head size] of each layer."""

    def key(self, request: int) -> Hashable:
        return None

    def virtual_tokens(self, request: int) -> int:
        return self.count

    def select(self, requests: Sequence[int | None]) -> None:
        pass  # every row has the same

    def fill(self, cache: Any, requests: Sequence[int]) -> int:
        for index, layer in enumerate(self.layers):
            keys, values = (side.expand(len(requests), -1, -1, -1) for side in layer)
            cache.update(keys, values, index)
        return self.count


def close_gaps(cache: Any, mask: Tensor) -> None:
    """Move the tokens of each row of a transformers cache to its last columns, in their order.

    Args:
        cache: Every layer keeps all columns.
        mask: [B, columns], 1 at tokens.
    """
    order = mask.argsort(dim=1, stable=True)  # padding first
    if bool((order == torch.arange(mask.shape[1], device=mask.device)).all()):
        return
    for layer in cache.layers:
        index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, 1)
        layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[3]))
