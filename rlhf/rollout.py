"""Rollouts: answers sampled from the policy. One table, SAMPLERS.

Every episode draws from a random stream of its own, seeded by (run seed, update, episode). Its answer therefore does
not depend on which process made it, beside which others, or after how many restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.lazy import lazy
from rlhf.table import Table

if TYPE_CHECKING:
    import torch
    import transformers

    from rlhf.tokenization import ChatTokenizer
else:
    torch, transformers = lazy("torch"), lazy("transformers")

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


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its token ids, the end token included, and whether it ended by itself (or a stop string)."""

    ids: list[int]
    ended: bool


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
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, chat: ChatTokenizer
) -> list[Answer]:
    """In process, over the transformers model and its KV cache; finished answers leave the batch.

    Args:
        model: A causal LM (PEFT wrappers allowed), its weights whole on this process.
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: How to draw.
        chat: For end tokens, padding and stop strings.

    Returns:
        One answer for each prompt, in order.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            found = _sample_batch(model, [prompts[i] for i in batch], [seeds[i] for i in batch], sampling, chat)
            answers.update(zip(batch, found))
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def _sample_batch(
    model: Any, prompts: list[list[int]], seeds: list[int], sampling: Sampling, chat: ChatTokenizer
) -> list[Answer]:
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    noise = torch.stack([_noise(seed, sampling.max_new_tokens) for seed in seeds]).to(device)
    ends = torch.tensor(end_ids(model, chat), device=device)
    cache = transformers.DynamicCache(config=model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))  # which answer each row of the batch belongs to
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(sampling.max_new_tokens):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        if step < sampling.min_new_tokens:
            logits[:, ends] = float("-inf")
        chosen = choose(logits, noise[rows, step], sampling)
        for row, token in zip(rows, chosen.tolist()):
            if not ended[row]:
                tokens[row].append(token)
        finished = torch.isin(chosen, ends).tolist()
        for row, done in zip(rows, finished):
            ended[row] = ended[row] or done or _stopped(tokens[row], sampling.stop, chat)
        alive = [i for i, row in enumerate(rows) if not ended[row]]
        if not alive or step + 1 == sampling.max_new_tokens:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(alive) <= 0.75 * len(rows):  # copying the cache pays once a quarter of it is idle
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
            rows = [rows[i] for i in alive]
    return [Answer(found, end) for found, end in zip(tokens, ended)]


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
