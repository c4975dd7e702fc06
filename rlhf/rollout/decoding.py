"""Decode completions in a fixed number of slots, with a KV cache that sequences join and leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.core.lazy import lazy
from rlhf.data.chat import stop_ids
from rlhf.rollout.types import Completion, SamplingParams

if TYPE_CHECKING:
    import torch
    import transformers

    from rlhf.data.chat import ChatTokenizer
    from rlhf.models import packed_attention
    from rlhf.rollout import decode_step, kv_cache
else:
    torch, transformers, kv_cache = lazy("torch"), lazy("transformers"), lazy("rlhf.rollout.kv_cache")
    decode_step, packed_attention = lazy("rlhf.rollout.decode_step"), lazy("rlhf.models.packed_attention")


class DecodingSlots:
    """A fixed number of places through which the answers pass.

    What the model needs of a place is in tensors, one element or row a place; who stands there, and what was found so
    far, is known to Python, so that a step asks the device once: for the tokens, and which answers are finished.
    """

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams,
        chat: ChatTokenizer,
        order: Sequence[int], joins: bool, step: decode_step.Step,
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.seeds, self.sampling, self.chat = model, prompts, seeds, sampling, chat
        self.waiting, self.joins, self.answers = list(order), joins, dict[int, Completion]()
        self.forward, self.fixed = decode_step.make_step(step, model.device), step != "eager"
        self.places: list[int | None] = [None] * min(len(order), sampling.batch_size)  # which answer stands there
        self.found: list[list[int]] = [[] for _ in self.places]  # its tokens so far
        self.cache: Any = None
        device, count = model.device, len(self.places)
        self.ends = torch.tensor(stop_ids(model, chat), device=device)
        self.end_set = set(self.ends.tolist())
        self.token, self.position, self.count, self.live = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.noise = torch.zeros(count, sampling.max_new_tokens, device=device)

    def run(self) -> dict[int, Completion]:
        """Everything in `order` answered."""
        while self.waiting or len(self._free()) < len(self.places):
            free = len(self._free())
            # a prefill costs about as much as a step: it waits until an eighth of the places is free
            if self.waiting and free >= min(len(self.waiting), max(1, len(self.places) // 8)):
                self._enter()
            elif not self.waiting and self._leaving(free):
                self._leave()
            else:
                self._step()
        return self.answers

    def _free(self) -> list[int]:
        return [place for place, answer in enumerate(self.places) if answer is None]

    def _leaving(self, free: int) -> bool:
        """Whether so much is idle that copying the cache pays."""
        if self.fixed:  # every number of places is another graph: few, by halves
            return len(self.places) >= 8 and free >= len(self.places) / 2
        return free >= len(self.places) / 8

    def _enter(self) -> None:
        """Prefill waiting prompts, each once, join them to the cache and draw their first tokens."""
        places = self._free()[: len(self.waiting)]
        coming, self.waiting = self.waiting[: len(places)], self.waiting[len(places) :]
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(tuple(self.prompts[i]) for i in coming))}
        rows, device = [list(prompt) for prompt in number], self.model.device
        source = torch.tensor([number[tuple(self.prompts[i])] for i in coming], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        width = max(map(len, rows))
        ids = torch.tensor([[self.chat.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = kv_cache.left_padded(lengths, width)
        # Without a config all layers keep all tokens, sliding windows too: what can be joined.
        cache = transformers.DynamicCache(config=None if self.joins else self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = decode_step.next_logits(self.model, ids, mask, positions, cache)
        if self.cache is None:
            self.cache = self._empty(cache)
        where = torch.tensor(places, device=device)
        self.cache.enter(cache, lengths[source], source, where)
        for place, answer in zip(places, coming):
            self.places[place], self.found[place] = answer, []
        self.noise[where] = torch.stack([gumbel_noise(self.seeds[i], self.sampling.max_new_tokens) for i in coming]).to(
            device
        )
        self.position[where], self.count[where], self.live[where] = lengths[source] - 1, 0, 1
        self._draw(logits[source], where)

    def _empty(self, prefill: Any) -> Any:
        """A cache with a row for every place, of the form of a filled one."""
        if self.fixed:
            longest = max(len(prompt) for prompt in self.prompts) + self.sampling.max_new_tokens
            return kv_cache.FixedCache(prefill, len(self.places), longest)
        return kv_cache.JoinedCache(prefill, len(self.places)) if self.joins else kv_cache.BatchCache(prefill)

    def _step(self) -> None:
        """One token more for every place."""
        standing = zip(self.places, self.found)
        longest = max(len(self.prompts[answer]) + len(found) for answer, found in standing if answer is not None)
        mask = self.cache.before_step(longest - 1)  # the newest token is not in the cache yet
        logits = self.forward(self.model, self.token[:, None], mask, self.position[:, None], self.cache.cache)
        self.cache.after_step()
        self._draw(logits, slice(None))

    def _draw(self, logits: torch.Tensor, where: Any) -> None:
        """Choose a token for each of these places; those whose answers are now finished become free."""
        count = self.count[where]
        if self.sampling.min_new_tokens:
            early = (count < self.sampling.min_new_tokens)[:, None]
            logits[:, self.ends] = logits[:, self.ends].masked_fill(early, float("-inf"))
        column = count[:, None].clamp(max=self.sampling.max_new_tokens - 1)
        chosen = choose(logits, self.noise[where].gather(1, column).squeeze(1), self.sampling)
        done = torch.isin(chosen, self.ends) | (count + 1 == self.sampling.max_new_tokens)
        self.token[where] = chosen
        self.count[where] += self.live[where]  # what stands in a free place stands still
        self.position[where] += self.live[where]
        places = range(len(self.places))[where] if isinstance(where, slice) else where.tolist()
        for place, token, finished in zip(places, *torch.stack([chosen, done]).tolist()):
            answer = self.places[place]
            if answer is not None:
                self.found[place].append(token)
                if finished or self.sampling.stop:
                    self._finish(place, answer, bool(finished))

    def _finish(self, place: int, answer: int, finished: bool) -> None:
        """Note the answer and free its place, if it is finished or holds a stop string."""
        found = self.found[place]
        ended = found[-1] in self.end_set or ends_with_stop(found, self.sampling.stop, self.chat)
        if finished or ended:
            self.answers[answer] = Completion(found, ended)
            self.places[place] = None
            self.live[place] = 0

    def _leave(self) -> None:
        """Give up the free places."""
        kept = [place for place, answer in enumerate(self.places) if answer is not None]
        if self.fixed:  # half of them, with some free ones among them
            kept = sorted([*kept, *self._free()[: math.ceil(len(self.places) / 2) - len(kept)]])
        keep = torch.tensor(kept, device=self.model.device)
        self.places, self.found = [self.places[i] for i in kept], [self.found[i] for i in kept]
        self.token, self.position, self.count = self.token[keep], self.position[keep], self.count[keep]
        self.live, self.noise = self.live[keep], self.noise[keep]
        self.cache.keep(keep)


def gumbel_noise(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def choose(logits: torch.Tensor, noise: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution at `noise`.

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


def ends_with_stop(tokens: list[int], stop: tuple[str, ...], chat: ChatTokenizer) -> bool:
    """True where the text so far holds a stop string. A stop string of n characters spans at most n + 8 tokens."""
    if not stop:
        return False
    text = chat.decode(tokens[-(max(map(len, stop)) + 8) :])
    return any(string in text for string in stop)
