"""Decode completions in a fixed number of slots over a KV cache that sequences join and leave."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, stop_ids
from rlhf.models.attention import plain_attention
from rlhf.rollout import decode_step, kv_cache
from rlhf.rollout.types import Completion, SamplingParams


class RowAdapters(Protocol):
    """Adapters of the model that differ from row to row; see `rlhf.inference.task_adapters`."""

    def key(self, request: int) -> Hashable:
        """Requests with equal prompts and equal keys may share a prefill."""
        ...

    def virtual_tokens(self, request: int) -> int:
        """Number of virtual tokens before a request's prompt."""
        ...

    def select(self, requests: Sequence[int | None]) -> None:
        """Use the adapters of these requests in the rows of the next forward passes; None: any adapter."""
        ...

    def fill(self, cache: Any, requests: Sequence[int]) -> int:
        """Write the virtual tokens of these requests into an empty cache, one row each, padded on the left.

        Returns:
            The columns written.
        """
        ...


@dataclass(frozen=True)
class _Prefilled:
    """Result of the forward pass over prompts."""

    key: Hashable
    """The last prompt."""
    logits: Tensor
    """float32 [prompts, V]: for the first token of each completion."""
    cache: Any
    lengths: Tensor
    """int64 [prompts]: tokens in the cache."""

    def row(self, number: int) -> _Prefilled:
        """A copy of one prompt's row, so that the rest can be freed."""
        kept = transformers.DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            kept.update(layer.keys[number : number + 1].clone(), layer.values[number : number + 1].clone(), index)
        rows = slice(number, number + 1)
        return _Prefilled(self.key, self.logits[rows].clone(), kept, self.lengths[rows])


class DecodingSlots:
    """A fixed number of decoding slots.

    Per-slot model state is in tensors with one row a slot. Which request is in a slot, and its tokens, are Python
    lists, so each step syncs with the GPU once: to read the new tokens and which completions are finished.
    """

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams,
        chat: ChatTokenizer, requests: Sequence[int], joins: bool, step: decode_step.StepKind,
        adapters: RowAdapters | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            requests: Which prompts to complete, in this order.
            joins: Whether new sequences can join the cache while others are being decoded (`kv_cache.joinable`).
            adapters: Adapters per row; None if all rows have the same.
        """
        self.adapters, self.windowed = adapters, kv_cache.windowed(model)
        self.model, self.prompts, self.seeds, self.sampling, self.chat = model, prompts, seeds, sampling, chat
        self.waiting, self.joins, self.completions = list(requests), joins, dict[int, Completion]()
        self.forward, self.fixed = decode_step.make_step(step, model.device), step != "eager"
        self.slots: list[int | None] = [None] * min(len(requests), sampling.batch_size)
        """The request in each slot; None where the slot is free."""
        self.tokens: list[list[int]] = [[] for _ in self.slots]
        self.logprobs: list[list[float]] = [[] for _ in self.slots]
        """As `tokens`; empty lists where log-probs are not wanted."""
        self.cache: Any = None
        self.held: _Prefilled | None = None
        """The prefill of the prompt whose further completions wait for a slot."""
        device, count = model.device, len(self.slots)
        self.ends = torch.tensor(stop_ids(model, chat), device=device)
        self.end_set = set(self.ends.tolist())
        self.token, self.position, self.count, self.live = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.noise = torch.zeros(count, sampling.max_new_tokens, device=device)

    def run(self) -> dict[int, Completion]:
        """Decode until every request has its completion."""
        while self.waiting or len(self._free()) < len(self.slots):
            free = len(self._free())
            # a prefill costs about as much as a step, so it waits until an eighth of the slots is free
            if self.waiting and free >= min(len(self.waiting), max(1, len(self.slots) // 8)):
                self._prefill_into_slots()
            elif not self.waiting and self._compaction_pays(free):
                self._compact()
            else:
                self._step()
        return self.completions

    def _free(self) -> list[int]:
        return [slot for slot, request in enumerate(self.slots) if request is None]

    def _compaction_pays(self, free: int) -> bool:
        """Whether enough slots are idle to pay for a copy of the cache."""
        if self.fixed:  # each number of slots needs another CUDA graph, so they only ever halve
            return len(self.slots) >= 8 and free >= len(self.slots) / 2
        return free >= len(self.slots) / 8

    def _prefill_into_slots(self) -> None:
        """Put waiting requests into free slots and sample their first tokens; a prompt is prefilled once."""
        slots = self._free()[: self._next_count()]
        requests, self.waiting = self.waiting[: len(slots)], self.waiting[len(slots) :]
        held, self.held = self.held, None
        known = [i for i in requests if held and self._key(i) == held.key]
        if held and known:
            self._enter(known, slots[: len(known)], held, [0] * len(known))
        new = [i for i in requests if not (held and self._key(i) == held.key)]
        if new:
            first: dict[Hashable, int] = {}  # distinct prompt -> a request that has it
            for request in new:
                first.setdefault(self._key(request), request)
            row_of = {key: row for row, key in enumerate(first)}
            prefilled = _Prefilled(self._key(new[-1]), *self._prefill(list(first.values())))
            if self.cache is None:
                self.cache = self._empty_cache(prefilled.cache)
            self._enter(new, slots[len(known) :], prefilled, [row_of[self._key(i)] for i in new])
            held = prefilled
        if self.waiting and held and self._key(self.waiting[0]) == held.key:
            self.held = held.row(row_of[held.key]) if new else held

    def _enter(self, requests: Sequence[int], slots: list[int], prefilled: _Prefilled, rows: list[int]) -> None:
        """Put requests into slots, each from its row of a prefill, and sample their first tokens."""
        device = self.model.device
        source, where = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        lengths = prefilled.lengths[source]
        self.cache.insert(prefilled.cache, lengths, source, where)
        for slot, request in zip(slots, requests):
            self.slots[slot], self.tokens[slot], self.logprobs[slot] = request, [], []
        noise = [uniform_noise(self.seeds[i], self.sampling.max_new_tokens) for i in requests]
        self.noise[where] = torch.stack(noise).to(device)
        self.position[where], self.count[where], self.live[where] = lengths - 1, 0, 1
        self._sample(prefilled.logits[source], where)

    def _next_count(self) -> int:
        """How many of the waiting requests can be prefilled together."""
        if self.adapters is None or not self.windowed:
            return len(self.waiting)
        # Padding between virtual tokens and prompt would count as distance in the mask of a sliding window.
        shortest = len(self.prompts[self.waiting[0]])
        return next((i for i, one in enumerate(self.waiting) if len(self.prompts[one]) != shortest), len(self.waiting))

    def _key(self, request: int) -> Hashable:
        prompt = tuple(self.prompts[request])
        return prompt if self.adapters is None else (self.adapters.key(request), prompt)

    def _length(self, request: int) -> int:
        """Tokens of a request's prompt, virtual ones included."""
        return len(self.prompts[request]) + (self.adapters.virtual_tokens(request) if self.adapters else 0)

    def _prefill(self, requests: Sequence[int]) -> tuple[Tensor, Any, Tensor]:
        """Logits [B, V] after the prompts of these requests, their cache padded on the left, and their lengths [B]."""
        rows, device = [self.prompts[request] for request in requests], self.model.device
        lengths = torch.tensor([self._length(request) for request in requests], device=device)
        width = max(map(len, rows))
        ids = torch.tensor([[self.chat.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = kv_cache.left_padded(torch.tensor([len(row) for row in rows], device=device), width)
        # Without a config every layer keeps all tokens, those with a sliding window too: sequences can then join.
        cache = transformers.DynamicCache(config=None if self.joins else self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.adapters is None:
            return kv_cache.next_logits(self.model, ids, mask, positions, cache), cache, lengths
        self.adapters.select(requests)
        virtual = self.adapters.fill(cache, requests)
        before = lengths - mask.sum(1)
        mask = torch.cat([kv_cache.left_padded(before, virtual), mask], dim=1)
        logits = kv_cache.next_logits(self.model, ids, mask, positions + before[:, None], cache)
        kv_cache.close_gaps(cache, mask)
        return logits, cache, lengths

    def _empty_cache(self, prefill: Any) -> Any:
        """A cache with a row for every slot and the layer shapes of `prefill`."""
        if self.fixed:
            longest = max(map(self._length, range(len(self.prompts)))) + self.sampling.max_new_tokens
            return kv_cache.FixedCache(prefill, len(self.slots), longest)
        return kv_cache.JoinedCache(prefill, len(self.slots)) if self.joins else kv_cache.BatchCache(prefill)

    def _step(self) -> None:
        """Decode one more token in every slot."""
        used = zip(self.slots, self.tokens)
        longest = max(self._length(request) + len(tokens) for request, tokens in used if request is not None)
        if self.adapters is not None:
            self.adapters.select(self.slots)
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
        slots = range(len(self.slots))[where] if isinstance(where, slice) else where.tolist()
        logprobs = None if normalizer is None else logprobs_of(logits, chosen, normalizer, self.sampling).tolist()
        for row, (slot, token, finished) in enumerate(zip(slots, *torch.stack([chosen, done]).tolist())):
            request = self.slots[slot]
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
            self.slots[slot] = None
            self.live[slot] = 0

    def _compact(self) -> None:
        """Drop the free slots."""
        kept = [slot for slot, request in enumerate(self.slots) if request is not None]
        if self.fixed:  # exactly half of the slots stay, maybe with free ones
            kept = sorted([*kept, *self._free()[: math.ceil(len(self.slots) / 2) - len(kept)]])
        keep = torch.tensor(kept, device=self.model.device)
        self.slots = [self.slots[i] for i in kept]
        self.tokens, self.logprobs = [self.tokens[i] for i in kept], [self.logprobs[i] for i in kept]
        self.token, self.position, self.count = self.token[keep], self.position[keep], self.count[keep]
        self.live, self.noise = self.live[keep], self.noise[keep]
        self.cache.keep(keep)


def decode(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
    step: decode_step.StepKind = "eager", adapters: RowAdapters | None = None,
) -> list[Completion]:  # fmt: skip
    """One completion of each prompt, in order; see `rlhf.rollout.samplers.hf`.

    Args:
        adapters: Adapters per row; None if all rows have the same.

    Raises:
        UserError: This device or the model's cache does not support `step`.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    joins = kv_cache.joinable(model)
    if step != "eager" and not joins:
        raise UserError(
            f"rollout.sampler: step `{step}` needs a cache with a key and a value per token",
            f"The cache of a {model.config.model_type} model is different.", "Leave `step` out.",
        )  # fmt: skip
    at_once = len(order) if joins else sampling.batch_size
    completions: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), plain_attention(model):
        for start in range(0, len(order), max(at_once, 1)):
            requests = order[start : start + at_once]
            slots = DecodingSlots(model, prompts, seeds, sampling, chat, requests, joins, step, adapters)
            completions |= slots.run()
    model.train(was_training)
    return [completions[i] for i in range(len(prompts))]


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
