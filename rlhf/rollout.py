"""Rollouts: answers sampled from the policy. One table, SAMPLERS.

With the sampler `hf` every episode draws from a random stream of its own, seeded by (run seed, update, episode). Its
answer therefore does not depend on which process made it, beside which others, or after how many restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlhf.errors import UserError
from rlhf.lazy import lazy
from rlhf.table import Table

if TYPE_CHECKING:
    import torch
    import transformers

    from rlhf import decode_step, kv_cache, packed_attention
    from rlhf.tokenization import ChatTokenizer
else:
    torch, transformers, kv_cache = lazy("torch"), lazy("transformers"), lazy("rlhf.kv_cache")
    decode_step, packed_attention = lazy("rlhf.decode_step"), lazy("rlhf.packed_attention")

SAMPLERS = Table("sampler")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int = 64

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's whole distribution at the temperature, nothing cut or barred."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1 and self.min_new_tokens == 0


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its token ids, the end token included, and whether it ended by itself (or a stop string)."""

    ids: list[int]
    ended: bool
    logprobs: list[float] | None = None
    """Of each token at the sampling temperature, nothing cut, as the sampler saw it: nats. None where the sampler
    reports none, or drew from something else (`Sampling.plain`)."""


def episode_seed(*parts: int) -> int:
    """A 63-bit seed from the parts (run seed, purpose, update, episode, ...), well mixed (splitmix64)."""
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@SAMPLERS.row("hf")
def hf(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, chat: ChatTokenizer, *,
    step: Literal["eager", "compiled", "cuda_graph"] = "eager",
) -> list[Answer]:  # fmt: skip
    """In process, over the transformers model; finished answers leave the batch and waiting prompts take their places.

    Answers to one prompt that begin together share its prefill. At most `sampling.batch_size` sequences are decoded at
    a time, which bounds the KV cache. A model whose cache cannot be joined (`kv_cache.joinable`) answers one batch
    after another; finished answers leave it all the same.

    A decoding step calls the model as it is (`eager`), or goes over a KV cache of fixed size: compiled for it by
    torch.compile, for each number of sequences anew (`compiled`; measured on a CPU alone, where it is slower), or
    recorded as a CUDA graph in each rollout and replayed (`cuda_graph`: NOT YET RUN, no GPU was at hand). Neither under
    ZeRO stage 3.

    Args:
        model: A causal LM (PEFT wrappers allowed), its weights whole on this process.
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: How to draw.
        chat: For end tokens, padding and stop strings.
        step: How a decoding step is taken.

    Returns:
        One answer for each prompt, in order.

    Raises:
        UserError: A `step` that this device or this model's cache rules out.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    joins = kv_cache.joinable(model)
    if step != "eager" and not joins:
        raise UserError(
            f"rollout.sampler: step `{step}` needs a cache with a key and a value per token",
            f"A model of the kind {model.config.model_type} keeps something else.", "Leave `step` out.",
        )  # fmt: skip
    plain = nullcontext() if step == "eager" else packed_attention.plain_attention(model)
    at_once = len(order) if joins else sampling.batch_size
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), plain:
        for start in range(0, len(order), max(at_once, 1)):
            some = order[start : start + at_once]
            answers |= _Decoding(model, prompts, seeds, sampling, chat, some, joins, step).run()
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


class _Decoding:
    """A fixed number of places through which the answers pass.

    What the model needs of a place is in tensors, one element or row a place; who stands there, and what was found so
    far, is known to Python, so that a step asks the device once: for the tokens, and which answers are finished.
    """

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, chat: ChatTokenizer,
        order: Sequence[int], joins: bool, step: decode_step.Step,
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.seeds, self.sampling, self.chat = model, prompts, seeds, sampling, chat
        self.waiting, self.joins, self.answers = list(order), joins, dict[int, Answer]()
        self.forward, self.fixed = decode_step.make_step(step, model.device), step != "eager"
        self.places: list[int | None] = [None] * min(len(order), sampling.batch_size)  # which answer stands there
        self.found: list[list[int]] = [[] for _ in self.places]  # its tokens so far
        self.cache: Any = None
        device, count = model.device, len(self.places)
        self.ends = torch.tensor(end_ids(model, chat), device=device)
        self.end_set = set(self.ends.tolist())
        self.token, self.position, self.count, self.live = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.noise = torch.zeros(count, sampling.max_new_tokens, device=device)

    def run(self) -> dict[int, Answer]:
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
        self.noise[where] = torch.stack([_noise(self.seeds[i], self.sampling.max_new_tokens) for i in coming]).to(
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
        ended = found[-1] in self.end_set or _stopped(found, self.sampling.stop, self.chat)
        if finished or ended:
            self.answers[answer] = Answer(found, ended)
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


@SAMPLERS.row("transformers", lacks=("stop", "min_new_tokens"), logprobs=True)
def continuous_batching(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, chat: ChatTokenizer, *,
    page_size: Annotated[int, Field(ge=4)] = 32,
) -> list[Answer]:  # fmt: skip
    """transformers' own continuous batching, in process, over a paged KV cache of `page_size` tokens a page.

    All answers of a call draw from one random stream, which follows from all their seeds: the same call gives the same
    answers, and a resumed run goes on as it would have, but an answer depends on which others are asked for with it,
    and so on the number of processes. It runs in a thread of its own, in the weights' own dtype, without autocast.
    At most `sampling.batch_size` answers are under way, for which the cache has room. Greedy decoding gives the tokens
    of `hf`. It knows neither stop strings nor `min_new_tokens`.
    """
    _refuse_what_it_lacks("transformers", sampling)
    if not prompts:
        return []
    pages = math.ceil((max(map(len, prompts)) + sampling.max_new_tokens) / page_size)
    settings = transformers.ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=pages * min(sampling.batch_size, len(prompts)),
        max_batch_tokens=max(MOST_PREFILLED, sampling.batch_size),
        max_requests_per_batch=sampling.batch_size,
        return_logprobs=sampling.plain,
        seed=episode_seed(*seeds),
        auto_switch_to_flash=False,  # the model's own attention, whatever else is installed
        disable_nccl_graph_mixing=False,  # no tensor parallelism here
    )
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    generation = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=end_ids(model, chat), pad_token_id=chat.pad_id,
        do_sample=sampling.temperature > 0, **(drawn if sampling.temperature > 0 else {}),
    )  # fmt: skip
    was_training = model.training
    with packed_attention.plain_attention(model), torch.random.fork_rng():  # the manager seeds the whole process
        found = _all_results(_manager(model, generation, settings), prompts)
    model.train(was_training)
    ends = set(end_ids(model, chat))
    return [Answer(f.generated_tokens, f.generated_tokens[-1] in ends, f.logprobs or None) for f in found]


def _manager(model: Any, generation: Any, settings: Any) -> Any:
    try:
        return model.init_continuous_batching(generation, settings)
    except ValueError as error:
        kind = model.config.model_type
        raise UserError(
            f"rollout.sampler: transformers' continuous batching does not take a model of the kind {kind}", str(error),
            "Use the sampler hf.",
        ) from None  # fmt: skip


MOST_PREFILLED = 1024
"""Prompt tokens that continuous batching takes into one pass: its attention mask grows with their number."""


def _all_results(manager: Any, prompts: Sequence[list[int]]) -> list[Any]:
    """What transformers' manager answers to the prompts, in order."""
    # All requests before the start: what is decoded beside what then follows from the call, not from the clock.
    for number, prompt in enumerate(prompts):
        manager.add_request(prompt, request_id=str(number))
    found: dict[str, Any] = {}
    manager.start()
    try:
        while len(found) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.error is None:
                found[result.request_id] = result
            elif result is not None or not manager.is_running():
                raise RuntimeError(f"transformers' continuous batching stopped: {result and result.error}")
    finally:
        manager.stop(block=True)
    return [found[str(number)] for number in range(len(prompts))]


@SAMPLERS.row("vllm", logprobs=True, gpu=True)
def vllm(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, chat: ChatTokenizer, *,
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4,
    max_model_len: Annotated[int, Field(gt=0)] | None = None, enforce_eager: bool = False,
) -> list[Answer]:  # fmt: skip
    """vLLM beside the trainer, in its process and on its GPU; gets the weights before each rollout, then sleeps.

    Written against vLLM 0.33 and NOT YET RUN: no GPU was at hand. Each answer draws from a stream of its own, but
    vLLM's kernels round otherwise in other batches, so a resumed run need not repeat to the token. With stop strings
    and `min_new_tokens` together, stop strings count from `min_new_tokens` on too. `gpu_memory_utilization` is the
    share of the GPU that vLLM may have while it answers, `max_model_len` the most tokens of prompt and answer (the
    model's own limit when left out, for which there must be room); `enforce_eager` goes without CUDA graphs.
    """
    from rlhf import vllm_engine

    return vllm_engine.answer(
        model, prompts, seeds, sampling, chat, end_ids(model, chat),
        gpu_memory_utilization=gpu_memory_utilization, max_model_len=max_model_len, enforce_eager=enforce_eager,
    )  # fmt: skip


def _refuse_what_it_lacks(name: str, sampling: Sampling) -> None:
    for option in lacking(name, sampling):
        raise UserError(f"rollout.{option}: the sampler `{name}` cannot do that", remedy="Use the sampler hf.")


def lacking(name: str, options: Any) -> list[str]:
    """Which of the options that are set (on a `Sampling`, or a config with the same names) a sampler cannot follow."""
    return [option for option in SAMPLERS[name].traits.get("lacks", ()) if getattr(options, option)]


def end_ids(model: Any, chat: ChatTokenizer) -> list[int]:
    """The tokens that end an answer: the chat template's first, then the tokenizer's and the generation config's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    others = {chat.tokenizer.eos_token_id, *listed} - {None, chat.end_id}
    return [chat.end_id, *sorted(others)]


def _noise(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def choose(logits: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> torch.Tensor:
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


def _stopped(tokens: list[int], stop: tuple[str, ...], chat: ChatTokenizer) -> bool:
    """True where the text so far holds a stop string. A stop string of n characters spans at most n + 8 tokens."""
    if not stop:
        return False
    text = chat.decode(tokens[-(max(map(len, stop)) + 8) :])
    return any(string in text for string in stop)
