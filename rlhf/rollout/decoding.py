"""Which requests are decoded when: prompts are prefilled as slots become free, and idle slots are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.attention import plain_attention
from rlhf.models.forward import causal_lm, has_virtual_tokens
from rlhf.rollout import kv_cache
from rlhf.rollout.slots import JoinedCache, Prefilled, Slots, left_padded, next_logits
from rlhf.rollout.types import Completion, RowAdapters, SamplingParams
from rlhf.rollout.virtual_tokens import VirtualTokens, close_gaps

StepKind = Literal["eager", "cuda_graph"]


def decode(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
    step: StepKind = "eager", adapters: RowAdapters | None = None,
) -> list[Completion]:  # fmt: skip
    """One completion of each prompt, in order; see `rlhf.rollout.samplers.hf`.

    Args:
        adapters: Adapters per row; None if all rows have the same.

    Raises:
        UserError: This device or the model's cache does not support `step`, or the cache does not support virtual
            tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    if has_virtual_tokens(model):
        model, adapters = causal_lm(model), VirtualTokens(model)
    with torch.inference_mode(), plain_attention(model):
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
        for start in range(0, len(order), max(at_once, 1)):
            requests = order[start : start + at_once]
            forward: Callable[..., Tensor] = next_logits
            new_cache: Callable[[Any, int], Any] = JoinedCache if joins else kv_cache.BatchCache
            if step == "cuda_graph":
                virtual = max(map(adapters.virtual_tokens, requests)) if adapters else 0
                longest = virtual + max(map(len, prompts)) + sampling.max_new_tokens
                forward, new_cache = kv_cache.GraphStep(model.device), partial(kv_cache.FixedCache, longest=longest)
            count = min(len(requests), sampling.batch_size)
            slots = Slots(count, model, seeds, sampling, chat, new_cache, forward, adapters)
            completions |= Schedule(slots, prompts, requests, joins, step == "cuda_graph").run()
        model.train(was_training)
        return [completions[i] for i in range(len(prompts))]


class Schedule:
    """Requests that wait for a slot."""

    def __init__(
        self, slots: Slots, prompts: Sequence[list[int]], requests: Sequence[int], joins: bool, halves: bool
    ) -> None:
        """
        Args:
            slots: The slots, all of them free.
            prompts: Token ids of all prompts.
            requests: Which prompts to complete, in this order.
            joins: Whether new sequences can join the cache while others are being decoded (`kv_cache.joinable`).
            halves: Whether the number of slots may only halve, since each one needs another CUDA graph.
        """
        self.slots, self.prompts, self.waiting, self.joins, self.halves = slots, prompts, list(requests), joins, halves
        # Padding between virtual tokens and prompt would count as distance in the mask of a sliding window.
        self.equal_lengths = slots.adapters is not None and kv_cache.windowed(slots.model)
        self.held: Prefilled | None = None
        """The prefill of the prompt whose further completions wait for a slot."""

    def run(self) -> dict[int, Completion]:
        """Decode until every request has its completion."""
        slots = self.slots
        while self.waiting or slots.requests.count(None) < len(slots.requests):
            count = len(slots.requests)
            if self.waiting:  # a prefill costs about as much as a step, so it waits for an eighth of the slots
                enough = min(len(self.waiting), max(1, count // 8))
            elif self.halves:
                enough = math.ceil(count / 2) if count >= 8 else count
            else:  # dropping slots costs a copy of the cache
                enough = math.ceil(count / 8)
            if slots.requests.count(None) < enough:
                slots.decode(enough)
            elif self.waiting:
                self._prefill_into_slots()
            else:
                self._compact()
        return slots.completions

    def _compact(self) -> None:
        """Drop the free slots."""
        requests = self.slots.requests
        kept = [slot for slot, request in enumerate(requests) if request is not None]
        if self.halves:  # exactly half of the slots stay, maybe with free ones
            kept = sorted([*kept, *self._free()[: math.ceil(len(requests) / 2) - len(kept)]])
        self.slots.keep(kept)

    def _free(self) -> list[int]:
        return [slot for slot, request in enumerate(self.slots.requests) if request is None]

    def _prefill_into_slots(self) -> None:
        """Put waiting requests into free slots and sample their first tokens; a prompt is prefilled once."""
        slots = self._free()[: self._next_count()]
        requests, self.waiting = self.waiting[: len(slots)], self.waiting[len(slots) :]
        held, self.held, rows = self.held, None, [0]
        known = [i for i in requests if held and self._key(i) == held.key]
        new = [i for i in requests if not (held and self._key(i) == held.key)]
        if held and known:
            self.slots.enter(slots[: len(known)], known, held, [0] * len(known))
        if new:
            first: dict[Hashable, int] = {}  # distinct prompt -> a request that has it
            for request in new:
                first.setdefault(self._key(request), request)
            row_of = {key: row for row, key in enumerate(first)}
            rows = [row_of[self._key(i)] for i in new]
            held = self._prefill(list(first.values()), self._key(new[-1]))
            self.slots.enter(slots[len(known) :], new, held, rows)
        if self.waiting and held and self._key(self.waiting[0]) == held.key:
            self.held = held.row(rows[-1]) if new else held

    def _next_count(self) -> int:
        """How many of the waiting requests can be prefilled together."""
        if not self.equal_lengths:
            return len(self.waiting)
        shortest = len(self.prompts[self.waiting[0]])
        return next((i for i, one in enumerate(self.waiting) if len(self.prompts[one]) != shortest), len(self.waiting))

    def _key(self, request: int) -> Hashable:
        prompt, adapters = tuple(self.prompts[request]), self.slots.adapters
        return prompt if adapters is None else (adapters.key(request), prompt)

    def _prefill(self, requests: Sequence[int], key: Hashable) -> Prefilled:
        """The forward pass over the prompts of these requests, padded on the left; `key` is the last one's."""
        model, adapters, pad = self.slots.model, self.slots.adapters, self.slots.chat.pad_id
        rows = [self.prompts[request] for request in requests]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        # Without a config every layer keeps all tokens, those with a sliding window too: sequences can then join.
        cache = transformers.DynamicCache(config=None if self.joins else model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if adapters is None:
            return Prefilled(key, next_logits(model, ids, mask, positions, cache), cache, list(map(len, rows)))
        adapters.select(requests)
        columns = adapters.fill(cache, requests)
        virtual = list(map(adapters.virtual_tokens, requests))
        before = torch.tensor(virtual, device=model.device)
        mask = torch.cat([left_padded(before, columns), mask], dim=1)
        logits = next_logits(model, ids, mask, positions + before[:, None], cache)
        close_gaps(cache, mask)
        return Prefilled(key, logits, cache, [len(row) + more for row, more in zip(rows, virtual)])
