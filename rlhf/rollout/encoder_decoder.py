"""Completions of encoder-decoders, by transformers' `generate` with this project's random streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from rlhf.data.chat_tokenizer import ChatTokenizer, stop_ids
from rlhf.rollout.slots import choose, ends_with_stop, log_normalizer, logprobs_of, uniform_noise
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.tuning.save import generation_config


def sample(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer
) -> list[Completion]:
    """One completion of each prompt, in order, `sampling.batch_size` at a time; arguments as those of the sampler `hf`.

    As there, a completion depends only on its prompt and seed.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    completions: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), sampling.batch_size):
            part = order[start : start + sampling.batch_size]
            found = _batch(model, [prompts[i] for i in part], [seeds[i] for i in part], sampling, chat)
            completions |= zip(part, found)
    model.train(was_training)
    return [completions[i] for i in range(len(prompts))]


def _batch(
    model: Any, prompts: list[list[int]], seeds: list[int], sampling: SamplingParams, chat: ChatTokenizer
) -> list[Completion]:
    ids, mask = chat.pad(prompts, model.device)
    ends = stop_ids(model, chat)
    noise = torch.stack([uniform_noise(seed, sampling.max_new_tokens) for seed in seeds]).to(model.device)
    config = generation_config(model, chat)
    config.update(do_sample=False, max_new_tokens=sampling.max_new_tokens, max_length=None, use_cache=True)
    chosen = _Chosen(noise, sampling, torch.tensor(ends, device=model.device))
    stopping = [lambda tokens, scores: _stopped(tokens, sampling, chat)] if sampling.stop else []
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config,
        logits_processor=transformers.LogitsProcessorList([chosen]),
        stopping_criteria=transformers.StoppingCriteriaList(stopping),
    )  # fmt: skip
    found = [_completion(row[1:].tolist(), ends, sampling, chat) for row in output]
    if not sampling.logprobs:
        return found
    columns = torch.stack(chosen.logprobs, dim=1).tolist()
    return [replace(one, logprobs=row[: len(one.ids)]) for one, row in zip(found, columns)]


class _Chosen(transformers.LogitsProcessor):
    """Masks all tokens of a row but the one that its random stream draws (see `rlhf.rollout.slots.choose`)."""

    def __init__(self, noise: Tensor, sampling: SamplingParams, ends: Tensor) -> None:
        self.noise, self.sampling, self.ends = noise, sampling, ends
        self.logprobs: list[Tensor] = []
        """float32 [B] of each step, where log-probs are wanted."""

    def __deepcopy__(self, memo: Any) -> _Chosen:
        return self  # PEFT's generate copies its arguments, but the log-probs are read from this object

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        count = input_ids.shape[1] - 1  # without the decoder's start token
        scores = scores.float()
        normalizer = log_normalizer(scores, self.sampling) if self.sampling.logprobs else None
        if count < self.sampling.min_new_tokens:
            scores = scores.index_fill(-1, self.ends, float("-inf"))
        token = choose(scores, self.noise[:, count], self.sampling)
        if normalizer is not None:
            self.logprobs.append(logprobs_of(scores, token, normalizer, self.sampling))
        return torch.full_like(scores, float("-inf")).scatter(-1, token[:, None], 0.0)


def _stopped(tokens: Tensor, sampling: SamplingParams, chat: ChatTokenizer) -> Tensor:
    found = [ends_with_stop(row[1:].tolist(), sampling.stop, chat) for row in tokens]
    return torch.tensor(found, device=tokens.device)


def _completion(tokens: list[int], ends: list[int], sampling: SamplingParams, chat: ChatTokenizer) -> Completion:
    """The tokens up to the first end token or stop string; what follows is padding."""
    for count, token in enumerate(tokens, 1):
        if token in ends or ends_with_stop(tokens[:count], sampling.stop, chat):
            return Completion(tokens[:count], True)
    return Completion(tokens, False)
