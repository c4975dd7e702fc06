"""Kinds of KV caches: which one a model needs, and those that are rarer than `slots.JoinedCache`."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.core.errors import UserError
from rlhf.rollout.slots import SPARE, JoinedCache, JoinedLayer, cache_argument, left_padded, next_logits

# ---- families of models ----------------------------------------------------------------------------------------------


def check_family(config: Any) -> None:
    """Refuse a family that cannot be sampled from, by its Hugging Face config and before its weights are loaded.

    Raises:
        UserError: See `cache_argument`.
    """
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None:  # else the model comes with its own code
        cache_argument(kind)


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


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class GraphStep:
    """`next_logits` as a CUDA graph, replayed without launching each operation.

    The graph is recorded again whenever a tensor that it reads or writes has moved or changed shape, so the KV cache
    must be a `FixedCache`. Not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            UserError: The device is not CUDA.
        """
        if device.type != "cuda":
            raise UserError(
                f"rollout.sampler: step `cuda_graph` needs a CUDA device, and the policy is on `{device.type}`",
                remedy="Leave `step` out.",
            )
        self.addresses: list[tuple[int, torch.Size]] = []
        self.graph: Any = None
        self.logits = torch.empty(0)

    def __call__(self, model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """As `next_logits`; the next call overwrites the result."""
        tensors = [ids, mask, positions, *(t for layer in cache.layers for t in (layer.keys, layer.values))]
        addresses = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
        if addresses != self.addresses:
            self._record(model, ids, mask, positions, cache)
            self.addresses = addresses
        self.graph.replay()
        return self.logits

    def _record(self, *arguments: Any) -> None:
        self.graph = None  # frees its memory before the new graph needs some
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate memory in their first calls, which no graph may record
            for _ in range(2):
                next_logits(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # `thread_local`: other threads (NCCL's) may use CUDA during the recording
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = next_logits(*arguments)


class FixedLayer(JoinedLayer):
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


class FixedCache(JoinedCache):
    """Like `JoinedCache`, with buffers whose shape is fixed and whose address changes only when rows are dropped.

    CUDA graphs need this. Memory: rows x (the most tokens a sequence can have + `SPARE`, rounded up to 64).
    """

    layer = FixedLayer

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


# ---- batch after batch -----------------------------------------------------------------------------------------------


class BatchCache:
    """transformers' own cache of one batch, for models whose layers keep something other than a key per token.

    Rows may leave it, and several may start as copies of one; nothing can join until all have left.
    """

    def __init__(self, prefill: Any, rows: int) -> None:
        self.cache, self.mask = prefill, torch.empty(rows, 0)

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
