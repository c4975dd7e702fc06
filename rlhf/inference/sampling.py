"""Sampling completions from a loaded policy, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from rlhf.core.console import progress, warn
from rlhf.core.errors import UserError
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.schema import Prompt
from rlhf.data.selection import as_prompt
from rlhf.inference.policy import Policy
from rlhf.inference.sampling_params import sampling_params
from rlhf.inference.task_adapters import TaskAdapters
from rlhf.models.forward import causal_lm, is_encoder_decoder
from rlhf.rollout.kv_cache import joinable
from rlhf.rollout.samplers import hf
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import Completion, SamplingParams

BATCHES_AT_ONCE = 8
"""Batches that are given to the sampler at once, so that waiting prompts enter the slots of finished completions."""


@dataclass(frozen=True)
class Sampled:
    """One completion of one prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    completion: Completion
    text: str
    """The completion as text, including the stop string that ended it, if any."""

    @staticmethod
    def of(chat: ChatTokenizer, prompt: Prompt, text: str) -> Sampled:
        """A given answer, in the place of a policy's."""
        return Sampled(prompt, chat.prompt(prompt.messages), Completion(chat.response(text), ended=True), text)


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seed: int,
    n: int = 1,
    prompt_limit: int | None = None,
    routed: TaskAdapters | None = None,
) -> Iterator[list[Sampled]]:
    """Sample `n` completions of each prompt. Yields the completions of one prompt at a time, in order.

    The random stream of a completion depends only on the seed, the prompt's content and the completion's index, so a
    result does not change with the other prompts or with `n`.

    Args:
        policy: The model to sample from.
        prompts: The prompts. One that is longer than `prompt_limit` keeps its end; a warning counts them.
        params: How to sample.
        seed: Seed of all random streams.
        n: Completions per prompt.
        prompt_limit: Longest prompt in tokens; by default what the completion leaves of the sequence.
        routed: Which adapter answers each of the prompts.
    """
    prompt_limit = prompt_limit or policy.prompt_limit(params)
    per_batch, cut = max(1, BATCHES_AT_ONCE * params.batch_size // n), 0
    with progress(f"sampling from {policy.path}", len(prompts), "tokens") as advance:
        for start in range(0, len(prompts), per_batch):
            batch = prompts[start : start + per_batch]
            whole = [policy.chat.prompt(p.messages) for p in batch]
            cut += sum(len(row) > prompt_limit for row in whole)
            ids = [policy.chat.truncate_prompt(row, prompt_limit) for row in whole]
            seeds = [stream_seed(seed, int(p.prompt_id, 16), k) for p in batch for k in range(n)]
            rows = [row for row in ids for _ in range(n)]
            if routed is None:
                completions = draw(policy, rows, seeds, params)
            else:
                tasks = [routed.task_of[p.prompt_id] for p in batch for _ in range(n)]
                completions = routed.sample(rows, tasks, seeds, params)
            advance(len(batch), sum(len(completion.ids) for completion in completions))
            for i, prompt in enumerate(batch):
                mine = completions[i * n : (i + 1) * n]
                yield [Sampled(prompt, ids[i], one, policy.chat.decode(one.ids)) for one in mine]
    if cut:
        warn(f"{cut:,} prompts are longer than {prompt_limit:,} tokens and were cut to their end")


def accepted(policy: Policy, prompts: Sequence[Prompt], scorers: Sequence[ChatTokenizer] = ()) -> list[Prompt]:
    """The prompts that the policy's chat template accepts; a warning counts the others and names the first.

    The templates of `scorers`, the tokenizers of reward models that read text in their own tokens, must accept them
    too.

    Raises:
        UserError: It accepts none of them.
    """
    kept, counts = [], EncodingCounts()
    for prompt in prompts:
        try:
            for chat in (policy.chat, *scorers):
                chat.prompt(prompt.messages)
        except RefusedText as error:
            counts.refuse(prompt, error)
        else:
            kept.append(prompt)
    if counts.refused and not kept:
        first = counts.refused[0]
        raise UserError(f"{policy.path}: no prompt can be used: {first['fault']}", remedy=first["remedy"])
    counts.report_refused("prompts")
    return kept


def complete(
    policy: Policy,
    prompts: Sequence[str | Sequence[Mapping[str, str]] | Prompt],
    n: int = 1,
    seed: int = 0,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    stop: Sequence[str] = (),
) -> list[list[str]]:
    """`n` completions of each prompt as text. Options left out are as a PPO run sampled in training, else 128 tokens
    from the plain distribution.

    Args:
        policy: The model to sample from.
        prompts: User messages, {role, content} mappings, or `Prompt`s.
        n: Completions per prompt.
        seed: Seed of all random streams.
        max_new_tokens: Longest completion in tokens.
        temperature: 0 is greedy.
        top_p: Sample from the most probable tokens with this total probability.
        top_k: Sample from this many most probable tokens; 0 is off.
        stop: Texts that end a completion.

    Raises:
        UserError: An option is out of its range, or one of `prompts` is not a prompt.
    """
    params = sampling_params(
        policy.path, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop
    )
    wanted = [as_prompt(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    return [[one.text for one in row] for row in sample(policy, wanted, params, seed, n)]


def draw(
    policy: Policy, prompts: Sequence[list[int]], seeds: Sequence[int], params: SamplingParams
) -> list[Completion]:
    """One completion of each tokenised prompt, each from its own random stream."""
    if policy.prompt_learning and not is_encoder_decoder(policy.model) and not joinable(causal_lm(policy.model)):
        # `hf` puts virtual tokens into a cache that such a model does not have; PEFT's own `generate` needs none
        return [generate(policy, ids, seed, params) for ids, seed in zip(prompts, seeds)]
    return hf(policy.model, prompts, seeds, params, policy.chat)


def generate(
    policy: Policy,
    prompt: list[int],
    seed: int,
    params: SamplingParams,
    on_token: Callable[[int], None] | None = None,
) -> Completion:
    """One completion by transformers' `generate`.

    Args:
        policy: The model to sample from.
        prompt: Token ids.
        seed: Seed of torch's generator.
        params: How to sample.
        on_token: Called with each token when it is sampled; an exception raised in it ends the completion.
    """
    chat, ends = policy.chat, policy.model.generation_config.eos_token_id
    before = 1 if is_encoder_decoder(policy.model) else len(prompt)  # tokens that `generate` puts before the completion
    options: dict[str, Any] = {"do_sample": False}
    if params.temperature > 0:
        options = {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k}
        options["top_p"] = params.top_p

    def stopped(ids: torch.Tensor, scores: Any = None) -> torch.Tensor:
        # The option `stop_strings` would also match a stop string that begins in the prompt.
        text = chat.decode(ids[0, before:].tolist())
        return torch.tensor([any(string in text for string in params.stop)], device=ids.device)

    if params.stop:
        options["stopping_criteria"] = transformers.StoppingCriteriaList([stopped])
    if on_token is not None:
        options["streamer"] = _TokenStream(on_token)
    ids = torch.tensor([prompt], device=policy.model.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True,
            max_new_tokens=params.max_new_tokens, min_new_tokens=params.min_new_tokens or None, **options,
        )  # fmt: skip
    new = output[0, before:].tolist()
    return Completion(new, ended=new[-1] in ends or bool(stopped(output)))


class _TokenStream:
    """A streamer of `generate`, which first puts the prompt, then each new token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value.item()))
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` after the last token."""
