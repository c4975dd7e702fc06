"""KV caches whose rows come and go while a batch is being decoded; what `rlhf.rollout.samplers` decodes over.

All rows end in the same column, the newest token's, and are padded on the left: a mask of one flag a column is then
right for rotary, absolute and ALiBi positions and for sliding windows alike, since the distance between two columns of
a row is the distance between their tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 32
"""Columns that are allocated ahead: the cache is copied once in so many tokens, not at every one."""


def joinable(model: Any) -> bool:
    """True where every layer keeps a key and a value per token, so that new rows can join those being decoded.

    Not so for state-space and linear-attention layers, for layers that share or compress keys, and for attention in
    chunks, whose borders would be counted from the wrong column.
    """
    config = model.config.get_text_config(decoder=True)
    layers = transformers.DynamicCache(config=config).layers
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    )
    return not chunked and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def left_padded(lengths: Tensor, width: int) -> Tensor:
    """int64 [B, width]: the mask of rows with `lengths` tokens, int64 [B], padded on the left."""
    return (torch.arange(width, 0, -1, device=lengths.device) <= lengths[:, None]).long()


class Columns:
    """Which columns of the buffers hold something: from `start` up to `end`, the next token's."""

    at: Tensor
    """int64 []: `end` once more, where a compiled step reads it. In a `FixedCache` alone."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, head size], written in place."""

    is_sliding = False  # windows are cut by the model's mask: every layer keeps the same columns

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, columns: Columns) -> None:
        super().__init__()
        self.keys, self.values, self.columns = keys, values, columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers are there from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token of every row; gives all keys and values, as views."""
        start, end = self.columns.start, self.columns.end
        self.keys[:, :, end] = key_states[:, :, 0]
        self.values[:, :, end] = value_states[:, :, 0]
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Columns before the token that is being decoded."""
        return self.columns.end - self.columns.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns with the new ones, and the first one's number."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None is set."""
        return -1


class _FixedLayer(_Layer):
    """Writes where a tensor says, and gives all columns: the mask tells which of them hold something."""

    is_compileable = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token of every row; gives the buffers."""
        self.keys.index_copy_(2, self.columns.at[None], key_states)
        self.values.index_copy_(2, self.columns.at[None], value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """int64 []: columns before the token that is being decoded."""
        return self.columns.at

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, and the first one's number."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """All columns."""
        return self.keys.shape[2]


class JoinedCache:
    """Buffers for a number of rows; new sequences take the place of finished ones.

    Memory: rows x (tokens of the longest live sequence + `SPARE`), whatever is decoded altogether.
    """

    layer: type[_Layer] = _Layer

    def __init__(self, prefill: Any, rows: int) -> None:
        """Empty rows, of the form that the layers of a filled cache have."""
        columns, width = Columns(0, 0), prefill.get_seq_length()
        self.columns = columns
        size, device = self._size(width), prefill.layers[0].keys.device
        self.mask = torch.zeros(rows, size, dtype=torch.int64, device=device)

        def buffer(like: Tensor) -> Tensor:
            return like.new_zeros(rows, like.shape[1], size, like.shape[3])

        self.layers = [self.layer(buffer(x.keys), buffer(x.values), columns) for x in prefill.layers]
        self.cache = transformers.Cache(layers=list(self.layers))
        columns.end = width

    def _size(self, width: int) -> int:
        """Columns of buffers of which `width` are in use."""
        return width + SPARE

    def enter(self, prefill: Any, lengths: Tensor, source: Tensor, places: Tensor) -> None:
        """Copy prefilled prompts, padded on the left, into rows of this cache.

        Args:
            prefill: Cache of some prompts.
            lengths: int64 [B]: tokens of each of the rows that enter.
            source: int64 [B]: which row of `prefill` each takes; several may take the same.
            places: int64 [B]: where each goes.
        """
        width, end = prefill.get_seq_length(), self.columns.end
        if end < width:
            self._rebuild(None, width)
            end = self.columns.end
        self.columns.start = min(self.columns.start, end - width)
        self.mask[places] = 0
        self.mask[places, end - width : end] = left_padded(lengths, width)
        for mine, new in zip(self.layers, prefill.layers):
            mine.keys[places, :, end - width : end] = new.keys[source]
            mine.values[places, :, end - width : end] = new.values[source]

    def before_step(self, longest: int) -> Tensor:
        """Make room for one more token of every row.

        Args:
            longest: Tokens of the longest row that counts; what lies further back is dropped.

        Returns:
            int64 [rows, columns]: the attention mask, the new token included.
        """
        self.columns.start = self.columns.end - longest
        if self.columns.end == self.mask.shape[1]:
            self._rebuild(None, longest)
        self.mask[:, self.columns.end] = 1
        return self.mask[:, self.columns.start : self.columns.end + 1]

    def after_step(self) -> None:
        """The token that was decoded is now a part of its row."""
        self.columns.end += 1

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay, int64 [n]."""
        self._rebuild(rows, self.columns.end - self.columns.start)

    def _rebuild(self, rows: Tensor | None, width: int) -> None:
        """New buffers, layer by layer, in which the last `width` columns stand first, blank ones before them if few."""
        end = self.columns.end
        start, blank = max(0, end - width), max(0, width - end)

        def moved(old: Tensor, axis: int) -> Tensor:
            kept = old.narrow(axis, start, end - start)
            kept = kept if rows is None else kept.index_select(0, rows)
            shape = list(kept.shape)
            shape[axis] = self._size(width)
            new = old.new_zeros(shape)
            new.narrow(axis, blank, end - start).copy_(kept)
            return self._placed(old, new)

        self.mask = moved(self.mask, 1)
        for layer in self.layers:
            layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        self.columns.start, self.columns.end = 0, width

    def _placed(self, old: Tensor, new: Tensor) -> Tensor:
        """The tensor that takes the place of `old`."""
        return new


class FixedCache(JoinedCache):
    """The same in buffers that keep their size and, until rows are given up, their place in memory.

    Memory: rows x (most tokens that a sequence can have + `SPARE`, rounded up to 64).
    """

    layer = _FixedLayer

    def __init__(self, prefill: Any, rows: int, longest: int) -> None:
        """Empty rows for sequences of at most `longest` tokens."""
        self.columns_in_all = math.ceil((longest + SPARE) / 64) * 64  # few sizes: each is compiled for anew
        super().__init__(prefill, rows)
        self.columns.at = torch.zeros((), dtype=torch.int64, device=self.mask.device)

    def before_step(self, longest: int) -> Tensor:
        """As in `JoinedCache`, but the mask of all columns, int64 [rows, columns]."""
        super().before_step(longest)
        self.columns.at.fill_(self.columns.end)
        return self.mask

    def _size(self, width: int) -> int:
        return self.columns_in_all

    def _placed(self, old: Tensor, new: Tensor) -> Tensor:
        return old.copy_(new) if old.shape == new.shape else new


class BatchCache:
    """transformers' own cache of one batch, for models whose layers keep something else than a key per token.

    Rows may leave it, and several may begin as copies of one; nothing enters until all have left.
    """

    def __init__(self, prefill: Any) -> None:
        self.cache, self.mask = prefill, torch.empty(0)

    def enter(self, prefill: Any, lengths: Tensor, source: Tensor, places: Tensor) -> None:
        """As in `JoinedCache`; the rows must be all there are, in order."""
        self.mask = left_padded(lengths, int(lengths.max()))
        self.cache.reorder_cache(source)

    def before_step(self, longest: int) -> Tensor:
        """As in `JoinedCache`; nothing is dropped."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.mask

    def after_step(self) -> None:
        """The model has written the token."""

    def keep(self, rows: Tensor) -> None:
        """As in `JoinedCache`."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)
