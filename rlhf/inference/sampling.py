"""Sample completions from a loaded policy, with progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf.core.console import err, is_main, warn
from rlhf.core.lazy import lazy
from rlhf.data.schema import Prompt
from rlhf.inference.policy import Policy
from rlhf.rollout.samplers import hf
from rlhf.rollout.types import Completion, SamplingParams, stream_seed

if TYPE_CHECKING:
    import peft
    import torch
    import transformers
else:
    peft, torch, transformers = lazy("peft"), lazy("torch"), lazy("transformers")

BATCHES_AT_ONCE = 8
"""So many batches are handed to the sampler together: waiting prompts take the places of finished answers."""


@dataclass(frozen=True)
class Sampled:
    """One answer to one prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    answer: Completion
    text: str
    """The answer as text; a stop string that ended it is its end."""


def sample(
    policy: Policy, prompts: Sequence[Prompt], sampling: SamplingParams, seed: int, n: int = 1, room: int | None = None
) -> Iterator[list[Sampled]]:
    """Sample `n` answers to each prompt, yielded prompt by prompt in order, with a progress bar.

    The random stream of an answer follows from the seed, the prompt's content and the answer's number alone, so
    other prompts beside it, or more answers, change nothing.

    Args:
        policy: Answers.
        prompts: What is answered. A prompt longer than the room keeps its end; how many do is warned of.
        sampling: How to draw.
        seed: Of all random streams.
        n: Answers to each prompt.
        room: Tokens that a prompt may have; what the policy leaves when not given.
    """
    room = room or policy.room(sampling)
    batches = 1 if policy.prompt_learning else BATCHES_AT_ONCE
    per_batch, cut = max(1, batches * sampling.batch_size // n), 0
    with _token_meter(f"sampling from {policy.path}", len(prompts)) as advance:
        for start in range(0, len(prompts), per_batch):
            batch = prompts[start : start + per_batch]
            whole = [policy.chat.prompt(p.messages) for p in batch]
            cut += sum(len(row) > room for row in whole)
            ids = [policy.chat.cut_prompt(row, room) for row in whole]
            seeds = [stream_seed(seed, int(p.prompt_id, 16), k) for p in batch for k in range(n)]
            answers = draw(policy, [row for row in ids for _ in range(n)], seeds, sampling)
            advance(len(batch), sum(len(answer.ids) for answer in answers))
            for i, prompt in enumerate(batch):
                mine = answers[i * n : (i + 1) * n]
                yield [Sampled(prompt, ids[i], answer, policy.chat.decode(answer.ids)) for answer in mine]
    if cut:
        warn(f"{cut:,} prompts are longer than {room:,} tokens and were cut to their end")


def draw(
    policy: Policy, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams
) -> list[Completion]:
    """One answer to each tokenised prompt, each from its own random stream; prompt-learning policies go one by one."""
    if policy.prompt_learning:
        return [generate(policy, ids, seed, sampling) for ids, seed in zip(prompts, seeds)]
    return hf(policy.model, prompts, seeds, sampling, policy.chat)


def generate(
    policy: Policy,
    prompt: list[int],
    seed: int,
    sampling: SamplingParams,
    on_token: Callable[[int], None] | None = None,
) -> Completion:
    """One answer through transformers' `generate`, token by token.

    Args:
        policy: Answers.
        prompt: Token ids.
        seed: Of torch's generator.
        sampling: How to draw.
        on_token: Called with each token as it comes; what it raises ends the answer.
    """
    chat, ends = policy.chat, policy.model.generation_config.eos_token_id
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options["top_p"] = sampling.top_p

    def stopped(ids: torch.Tensor, scores: Any = None) -> torch.Tensor:
        """As `hf` sees it. (The option `stop_strings` would also find a stop string that begins in the prompt.)"""
        text = chat.decode(ids[0, len(prompt) :].tolist())
        return torch.tensor([any(string in text for string in sampling.stop)], device=ids.device)

    if sampling.stop:
        options["stopping_criteria"] = transformers.StoppingCriteriaList([stopped])
    if on_token is not None:
        options["streamer"] = _TokenStream(on_token)
    ids = torch.tensor([prompt], device=policy.model.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True,
            max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.min_new_tokens or None, **options,
        )  # fmt: skip
    answer = output[0, len(prompt) :].tolist()
    return Completion(answer, ended=answer[-1] in ends or bool(stopped(output)))


class _TokenStream:
    """What `generate` calls a streamer: first put the prompt, then each new token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value.item()))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def _token_meter(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over prompts that shows tokens a second; silent where nobody looks."""
    console = err()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not (is_main() and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total, rate="")
        started, tokens = time.monotonic(), 0

        def advance(prompts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(task, advance=prompts, rate=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        yield advance
