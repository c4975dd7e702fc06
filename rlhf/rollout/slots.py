"""Decoding slots: the next token in each row of a batch, over a KV cache that sequences join and leave.

All rows of the cache end in the same column, that of the newest token, and are padded on the left. A mask with one flag
per column is then right for rotary, absolute and ALiBi positions and for sliding windows, because the distance between
two columns of a row equals the distance between their tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, stop_ids
from rlhf.rollout.types import Completion, RowAdapters, SamplingParams

SPARE = 32
"""Columns allocated in advance: the buffers are copied once per this many tokens, not at every token."""
KEYS, STATE = "past_key_values", "cache_params"
"""Names of the cache argument of `forward`; Mamba's families take the second, and ignore the first."""


@dataclass(frozen=True)
class Prefilled:
    """Result of the forward pass over prompts."""

    key: Hashable
    """The last prompt."""
    logits: Tensor
    """float32 [prompts, V]: for the first token of each completion."""
    cache: Any
    lengths: list[int]
    """Tokens of each prompt in the cache, virtual ones included."""

    def row(self, number: int) -> Prefilled:
        """A copy of one prompt's row, so that the rest can be freed."""
        kept = transformers.DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            kept.update(layer.keys[number : number + 1].clone(), layer.values[number : number + 1].clone(), index)
        return Prefilled(self.key, self.logits[number : number + 1].clone(), kept, [self.lengths[number]])


class Slots:
    """The rows of a decoding batch, each free or with a request that is being completed.

    Per-slot model state is in tensors with one row a slot. Which request is in a slot, and its tokens, are Python
    lists, so each step syncs with the GPU once: to read the new tokens and which completions are finished.
    """

    def __init__(
        self, count: int, model: Any, seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
        new_cache: Callable[[Any, int], Any], forward: Callable[..., Tensor], adapters: RowAdapters | None,
    ) -> None:  # fmt: skip
        """
        Args:
            count: The number of slots.
            seeds: Of the random stream of each request.
            new_cache: Makes an empty cache, given a prefilled one and the number of slots.
            forward: `next_logits`, or what does the same.
            adapters: Adapters per row; None if all rows have the same.
        """
        self.model, self.seeds, self.sampling, self.chat = model, seeds, sampling, chat
        self.new_cache, self.forward, self.adapters = new_cache, forward, adapters
        self.requests: list[int | None] = [None] * count
        """The request in each slot; None where the slot is free."""
        self.lengths = [0] * count
        """Tokens of each slot's prompt, virtual ones included."""
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        """As `tokens`; empty lists where log-probs are not wanted."""
        self.completions: dict[int, Completion] = {}
        self.cache: Any = None
        self.token, self.position, self.count, self.live = torch.zeros(4, count, dtype=torch.int64, device=model.device)
        self.noise = torch.zeros(count, sampling.max_new_tokens, device=model.device)
        ends = stop_ids(model, chat)
        self.ends, self.end_set = torch.tensor(ends, device=model.device), set(ends)

    def enter(self, slots: Sequence[int], requests: Sequence[int], prefilled: Prefilled, rows: Sequence[int]) -> None:
        """Put requests into slots, each from its row of a prefill, and sample their first tokens."""
        device = self.model.device
        if self.cache is None:
            self.cache = self.new_cache(prefilled.cache, len(self.requests))
        source, where = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        for slot, request, row in zip(slots, requests, rows):
            self.requests[slot], self.lengths[slot] = request, prefilled.lengths[row]
            self.tokens[slot], self.logprobs[slot] = [], []
        lengths = torch.tensor(prefilled.lengths, device=device)[source]
        self.cache.insert(prefilled.cache, lengths, source, where)
        noise = [uniform_noise(self.seeds[request], self.sampling.max_new_tokens) for request in requests]
        self.noise[where] = torch.stack(noise).to(device)
        self.position[where], self.count[where], self.live[where] = lengths - 1, 0, 1
        self._sample(prefilled.logits[source], where)

    def decode(self, free: int) -> None:
        """Decode one token after another in every slot, until this many slots are free."""
        while self.requests.count(None) < free:
            self._step()

    def _step(self) -> None:
        """Decode one more token in every slot."""
        used = zip(self.requests, self.lengths, self.tokens)
        longest = max(length + len(tokens) for request, length, tokens in used if request is not None)
        if self.adapters is not None:
            self.adapters.select(self.requests)
        mask = self.cache.before_step(longest - 1)  # the newest token is not in the cache yet
        logits = self.forward(self.model, self.token[:, None], mask, self.position[:, None], self.cache.cache)
        self.cache.after_step()
        self._sample(logits, slice(None))

    def _sample(self, logits: Tensor, where: Any) -> None:
        """Sample a token in each of the slots `where`; slots whose completion is finished become free."""
        count = self.count[where]
        normalizer = log_normalizer(logits, self.sampling) if self.sampling.logprobs else None
        if self.sampling.min_new_tokens:
            early = (count < self.sampling.min_new_tokens)[:, None]
            logits[:, self.ends] = logits[:, self.ends].masked_fill(early, float("-inf"))
        column = count[:, None].clamp(max=self.sampling.max_new_tokens - 1)
        chosen = choose(logits, self.noise[where].gather(1, column).squeeze(1), self.sampling)
        done = torch.isin(chosen, self.ends) | (count + 1 == self.sampling.max_new_tokens)
        self.token[where] = chosen
        self.count[where] += self.live[where]  # free slots do not advance
        self.position[where] += self.live[where]
        slots = range(len(self.requests))[where] if isinstance(where, slice) else where.tolist()
        logprobs = None if normalizer is None else logprobs_of(logits, chosen, normalizer, self.sampling).tolist()
        for row, (slot, token, finished) in enumerate(zip(slots, *torch.stack([chosen, done]).tolist())):
            request = self.requests[slot]
            if request is not None:
                self.tokens[slot].append(token)
                if logprobs is not None:
                    self.logprobs[slot].append(logprobs[row])
                if finished or self.sampling.stop:
                    self._finish(slot, request, bool(finished))

    def _finish(self, slot: int, request: int, finished: bool) -> None:
        """Store the completion and free its slot, if it is finished or contains a stop string."""
        tokens = self.tokens[slot]
        ended = tokens[-1] in self.end_set or ends_with_stop(tokens, self.sampling.stop, self.chat)
        if finished or ended:
            self.completions[request] = Completion(tokens, ended, self.logprobs[slot] or None)
            self.requests[slot] = None
            self.live[slot] = 0

    def keep(self, slots: list[int]) -> None:
        """Keep only these slots."""
        rows = torch.tensor(slots, device=self.model.device)
        self.requests, self.lengths = [self.requests[i] for i in slots], [self.lengths[i] for i in slots]
        self.tokens, self.logprobs = [self.tokens[i] for i in slots], [self.logprobs[i] for i in slots]
        self.token, self.position, self.count = self.token[rows], self.position[rows], self.count[rows]
        self.live, self.noise = self.live[rows], self.noise[rows]
        self.cache.keep(rows)


# ---- a forward pass over a cache -------------------------------------------------------------------------------------


def next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits float32 [B, V] of the token after `ids`, int64 [B, T], given a transformers cache."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = cache_argument(type(inner))  # type: ignore[arg-type]
    inputs = {"attention_mask": mask, "position_ids": positions, name: cache}
    if name == STATE and ids.shape[1] == 1:  # Mamba's mask is only for the tokens of this pass, not for the cache's
        inputs["attention_mask"] = None
    last = ids.shape[1] - 1
    # An index, not a slice: a slice is not contiguous, and torch's matmul on a CPU would copy the head's weight for
    # every row of the batch.
    keep = torch.tensor([last], device=ids.device) if last else 1
    logits: Tensor = model(input_ids=ids, **inputs, use_cache=True, logits_to_keep=keep).logits[:, -1].float()
    return logits


@cache
def cache_argument(kind: Any) -> str:
    """What the forward pass of a class of models calls its cache.

    Raises:
        UserError: It does not take transformers' cache.
    """
    parameters = inspect.signature(kind.forward).parameters
    found = next((name for name in (KEYS, STATE) if name in parameters), None)
    if found is None:
        raise UserError(
            f"{kind.__name__} cannot be sampled from: it does not take transformers' cache",
            "It caches in a format of its own, which the samplers do not support.",
            "SFT, reward model and export work; for PPO and sampling use another model.",
        )
    return found


# ---- the cache -------------------------------------------------------------------------------------------------------


def left_padded(lengths: Tensor, width: int) -> Tensor:
    """int64 [B, width]: the mask of rows with `lengths` tokens, int64 [B], padded on the left."""
    return (torch.arange(width, 0, -1, device=lengths.device) <= lengths[:, None]).long()


class ColumnRange:
    """The columns of the buffers in use: from `start` up to `end`, where the next token goes. Shared by all layers."""

    next_column: Tensor
    """`end` as int64 [], which a CUDA graph reads. Only in a `FixedCache`."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class JoinedLayer(CacheLayerMixin):
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


class JoinedCache:
    """Buffers for a number of rows; new sequences replace finished ones.

    Memory: rows x (tokens of the longest live sequence + `SPARE`), however many sequences are decoded in total.
    """

    layer: type[JoinedLayer] = JoinedLayer

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


# ---- sampling --------------------------------------------------------------------------------------------------------


def uniform_noise(seed: int, count: int) -> Tensor:
    """float32 [count], uniform in [0, 1), from a generator with that seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def choose(logits: Tensor, noise: Tensor, sampling: SamplingParams) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution at `noise`.

    Args:
        logits: float32 [B, V].
        noise: float32 [B], uniform in [0, 1).
        sampling: Temperature, top_k and top_p.

    Returns:
        int64 [B].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = transformers.TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = transformers.TopPLogitsWarper(sampling.top_p)(None, logits)
    cumulative = logits.softmax(-1).cumsum(-1)
    target = noise[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def log_normalizer(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """What to subtract from logits [B, V] over the temperature to get log-probs, float32 [B]."""
    return (logits / sampling.temperature if sampling.temperature else logits).logsumexp(-1)


def logprobs_of(logits: Tensor, chosen: Tensor, normalizer: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probs of the chosen tokens [B] under the whole distribution at the temperature (1 where greedy), [B]."""
    picked = logits.gather(-1, chosen[:, None]).squeeze(-1)
    return (picked / sampling.temperature if sampling.temperature else picked) - normalizer


def ends_with_stop(tokens: list[int], stop: tuple[str, ...], chat: ChatTokenizer) -> bool:
    """True if the last tokens contain a stop string. A stop string of n characters spans at most n + 8 tokens."""
    if not stop:
        return False
    text = chat.decode(tokens[-(max(map(len, stop)) + 8) :])
    return any(string in text for string in stop)
