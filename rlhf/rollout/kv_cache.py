"""KV caches that sequences join and leave while a batch is being decoded.

All rows end in the same column, that of the newest token, and are padded on the left. A mask with one flag per column
is then right for rotary, absolute and ALiBi positions and for sliding windows, because the distance between two columns
of a row equals the distance between their tokens.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from rlhf.core.errors import UserError

SPARE = 32
"""Columns allocated in advance: the buffers are copied once per this many tokens, not at every token."""
KEYS, STATE = "past_key_values", "cache_params"
"""Names of the cache argument of `forward`; Mamba's families take the second, and ignore the first."""


# ---- a forward pass over a cache -------------------------------------------------------------------------------------


def next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits float32 [B, V] of the token after `ids`, int64 [B, T], given a transformers cache."""
    inputs = {"attention_mask": mask, "position_ids": positions, cache_name(model): cache}
    if STATE in inputs and ids.shape[1] == 1:  # Mamba's mask is only for the tokens of this pass, not for the cache's
        inputs["attention_mask"] = None
    last = ids.shape[1] - 1
    # An index, not a slice: a slice is not contiguous, and torch's matmul on a CPU would copy the head's weight for
    # every row of the batch.
    keep = torch.tensor([last], device=ids.device) if last else 1
    logits: Tensor = model(input_ids=ids, **inputs, use_cache=True, logits_to_keep=keep).logits[:, -1].float()
    return logits


def cache_name(model: Any) -> str:
    """What the forward pass of a model, or of the model in a PEFT wrapper, calls its cache.

    Raises:
        UserError: It does not take transformers' cache.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cache_of(type(inner))  # type: ignore[arg-type]


def check_family(config: Any) -> None:
    """Refuse a family that cannot be sampled from, by its Hugging Face config and before its weights are loaded.

    Raises:
        UserError: See `cache_name`.
    """
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None:  # else the model comes with its own code
        cache_of(kind)


@cache
def cache_of(kind: Any) -> str:
    """`cache_name` of a class of models."""
    parameters = inspect.signature(kind.forward).parameters
    found = next((name for name in (KEYS, STATE) if name in parameters), None)
    if found is None:
        raise UserError(
            f"{kind.__name__} cannot be sampled from: it does not take transformers' cache",
            "It caches in a format of its own, which the samplers do not support.",
            "SFT, reward model and export work; for PPO and sampling use another model.",
        )
    return found


# ---- caches ----------------------------------------------------------------------------------------------------------


def joinable(model: Any) -> bool:
    """True if every layer keeps a key and a value per token, so that new rows can join those being decoded.

    False for state-space and linear-attention layers, for layers that share or compress keys, and for chunked
    attention, whose chunk borders would be counted from the wrong column.
    """
    config = model.config.get_text_config(decoder=True)
    layers = transformers.DynamicCache(config=config).layers
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    )
    return not chunked and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def windowed(model: Any) -> bool:
    """True if a layer of the model attends to a sliding window only."""
    layers = transformers.DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)


def left_padded(lengths: Tensor, width: int) -> Tensor:
    """int64 [B, width]: the mask of rows with `lengths` tokens, int64 [B], padded on the left."""
    return (torch.arange(width, 0, -1, device=lengths.device) <= lengths[:, None]).long()


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


class ColumnRange:
    """The columns of the buffers in use: from `start` up to `end`, where the next token goes. Shared by all layers."""

    next_column: Tensor
    """`end` as int64 [], which a CUDA graph reads. Only in a `FixedCache`."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, head size], written in place."""

    is_sliding = False  # the model's mask applies sliding windows; every layer keeps the same columns

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, columns: ColumnRange) -> None:
        super().__init__()
        self.keys, self.values, self.columns = keys, values, columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token of every row; return all keys and values as views."""
        start, end = self.columns.start, self.columns.end
        self.keys[:, :, end] = key_states[:, :, 0]
        self.values[:, :, end] = value_states[:, :, 0]
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Columns before the token that is being decoded."""
        return self.columns.end - self.columns.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns including the new ones, and the offset of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class _FixedLayer(_Layer):
    """Writes at the column given by a tensor and returns all columns; the mask hides the unused ones."""

    is_compileable = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token of every row; return the buffers."""
        self.keys.index_copy_(2, self.columns.next_column[None], key_states)
        self.values.index_copy_(2, self.columns.next_column[None], value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """int64 []: columns before the token that is being decoded."""
        return self.columns.next_column

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of all columns, and the offset of the first."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Number of all columns."""
        return self.keys.shape[2]


class JoinedCache:
    """Buffers for a number of rows; new sequences replace finished ones.

    Memory: rows x (tokens of the longest live sequence + `SPARE`), however many sequences are decoded in total.
    """

    layer: type[_Layer] = _Layer

    def __init__(self, prefill: Any, rows: int) -> None:
        """Empty rows with the layer shapes, dtypes and device of `prefill`, a filled transformers cache."""
        columns, width = ColumnRange(0, 0), prefill.get_seq_length()
        self.columns = columns
        size, device = self._allocated(width), prefill.layers[0].keys.device
        self.mask = torch.zeros(rows, size, dtype=torch.int64, device=device)

        def buffer(like: Tensor) -> Tensor:
            return like.new_zeros(rows, like.shape[1], size, like.shape[3])

        self.layers = [self.layer(buffer(x.keys), buffer(x.values), columns) for x in prefill.layers]
        self.cache = transformers.Cache(layers=list(self.layers))
        columns.end = width

    def _allocated(self, width: int) -> int:
        """Columns to allocate when `width` are in use."""
        return width + SPARE

    def insert(self, prefill: Any, lengths: Tensor, source: Tensor, rows: Tensor) -> None:
        """Copy prefilled prompts, padded on the left, into rows of this cache.

        Args:
            prefill: Cache of the prompts.
            lengths: int64 [B]: tokens of each inserted row.
            source: int64 [B]: the row of `prefill` to copy; several may copy the same one.
            rows: int64 [B]: the row of this cache to write.
        """
        width, end = prefill.get_seq_length(), self.columns.end
        if end < width:
            self._rebuild(None, width)
            end = self.columns.end
        self.columns.start = min(self.columns.start, end - width)
        self.mask[rows] = 0
        self.mask[rows, end - width : end] = left_padded(lengths, width)
        for mine, new in zip(self.layers, prefill.layers):
            mine.keys[rows, :, end - width : end] = new.keys[source]
            mine.values[rows, :, end - width : end] = new.values[source]

    def before_step(self, longest: int) -> Tensor:
        """Make room for one more token in every row.

        Args:
            longest: Tokens of the longest live row; columns before it are dropped.

        Returns:
            int64 [rows, columns]: the attention mask, including the new token.
        """
        self.columns.start = self.columns.end - longest
        if self.columns.end == self.mask.shape[1]:
            self._rebuild(None, longest)
        self.mask[:, self.columns.end] = 1
        return self.mask[:, self.columns.start : self.columns.end + 1]

    def after_step(self) -> None:
        """Count the decoded token as part of its row."""
        self.columns.end += 1

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, int64 [n]."""
        self._rebuild(rows, self.columns.end - self.columns.start)

    def _rebuild(self, rows: Tensor | None, width: int) -> None:
        """Copy the last `width` columns to the front of new buffers, layer by layer.

        Blank columns come first if there are fewer than `width`. `rows` selects the rows to keep; None keeps all.
        """
        end = self.columns.end
        start, blank = max(0, end - width), max(0, width - end)

        def moved(old: Tensor, axis: int) -> Tensor:
            kept = old.narrow(axis, start, end - start)
            kept = kept if rows is None else kept.index_select(0, rows)
            shape = list(kept.shape)
            shape[axis] = self._allocated(width)
            new = old.new_zeros(shape)
            new.narrow(axis, blank, end - start).copy_(kept)
            return self._replacement(old, new)

        self.mask = moved(self.mask, 1)
        for layer in self.layers:
            layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        self.columns.start, self.columns.end = 0, width

    def _replacement(self, old: Tensor, new: Tensor) -> Tensor:
        """The tensor to use in place of `old`."""
        return new


class FixedCache(JoinedCache):
    """Like `JoinedCache`, with buffers whose shape is fixed and whose address changes only when rows are dropped.

    CUDA graphs need this. Memory: rows x (the most tokens a sequence can have + `SPARE`, rounded up to 64).
    """

    layer = _FixedLayer

    def __init__(self, prefill: Any, rows: int, longest: int) -> None:
        """Empty rows for sequences of at most `longest` tokens."""
        self.width = math.ceil((longest + SPARE) / 64) * 64  # torch copies attention masks of unaligned width
        super().__init__(prefill, rows)
        self.columns.next_column = torch.zeros((), dtype=torch.int64, device=self.mask.device)

    def before_step(self, longest: int) -> Tensor:
        """As in `JoinedCache`, but returns the mask of all columns, int64 [rows, columns]."""
        super().before_step(longest)
        self.columns.next_column.fill_(self.columns.end)
        return self.mask

    def _allocated(self, width: int) -> int:
        return self.width

    def _replacement(self, old: Tensor, new: Tensor) -> Tensor:
        return old.copy_(new) if old.shape == new.shape else new


class BatchCache:
    """transformers' own cache of one batch, for models whose layers keep something other than a key per token.

    Rows may leave it, and several may start as copies of one; nothing can join until all have left.
    """

    def __init__(self, prefill: Any) -> None:
        self.cache, self.mask = prefill, torch.empty(0)

    def insert(self, prefill: Any, lengths: Tensor, source: Tensor, rows: Tensor) -> None:
        """As in `JoinedCache`; `rows` must be all rows, in order."""
        self.mask = left_padded(lengths, int(lengths.max()))
        self.cache.reorder_cache(source)

    def before_step(self, longest: int) -> Tensor:
        """As in `JoinedCache`; no column is dropped."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.mask

    def after_step(self) -> None:
        """Nothing to do: the model has written the token."""

    def keep(self, rows: Tensor) -> None:
        """As in `JoinedCache`."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)
