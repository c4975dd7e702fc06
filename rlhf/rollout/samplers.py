"""Rollouts: answers sampled from the policy. One table, SAMPLERS.

With the sampler `hf` every episode draws from a random stream of its own, seeded by (run seed, update, episode). Its
answer therefore does not depend on which process made it, beside which others, or after how many restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.core.table import Table
from rlhf.data.chat import stop_ids
from rlhf.rollout.decoding import DecodingSlots
from rlhf.rollout.types import Completion, SamplingParams, stream_seed

if TYPE_CHECKING:
    import torch
    import transformers

    from rlhf.data.chat import ChatTokenizer
    from rlhf.models import packed_attention
    from rlhf.rollout import decode_step, kv_cache
else:
    torch, transformers, kv_cache = lazy("torch"), lazy("transformers"), lazy("rlhf.rollout.kv_cache")
    decode_step, packed_attention = lazy("rlhf.rollout.decode_step"), lazy("rlhf.models.packed_attention")


SAMPLERS = Table("sampler")


@SAMPLERS.row("hf")
def hf(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    step: Literal["eager", "compiled", "cuda_graph"] = "eager",
) -> list[Completion]:  # fmt: skip
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
    answers: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), plain:
        for start in range(0, len(order), max(at_once, 1)):
            some = order[start : start + at_once]
            answers |= DecodingSlots(model, prompts, seeds, sampling, chat, some, joins, step).run()
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


@SAMPLERS.row("transformers", lacks=("stop", "min_new_tokens"), logprobs=True)
def continuous_batching(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    page_size: Annotated[int, Field(ge=4)] = 32,
) -> list[Completion]:  # fmt: skip
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
        seed=stream_seed(*seeds),
        auto_switch_to_flash=False,  # the model's own attention, whatever else is installed
        disable_nccl_graph_mixing=False,  # no tensor parallelism here
    )
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    generation = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=stop_ids(model, chat), pad_token_id=chat.pad_id,
        do_sample=sampling.temperature > 0, **(drawn if sampling.temperature > 0 else {}),
    )  # fmt: skip
    was_training = model.training
    with packed_attention.plain_attention(model), torch.random.fork_rng():  # the manager seeds the whole process
        found = _all_results(_manager(model, generation, settings), prompts)
    model.train(was_training)
    ends = set(stop_ids(model, chat))
    return [Completion(f.generated_tokens, f.generated_tokens[-1] in ends, f.logprobs or None) for f in found]


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
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4,
    max_model_len: Annotated[int, Field(gt=0)] | None = None, enforce_eager: bool = False,
) -> list[Completion]:  # fmt: skip
    """vLLM beside the trainer, in its process and on its GPU; gets the weights before each rollout, then sleeps.

    Written against vLLM 0.33 and NOT YET RUN: no GPU was at hand. Each answer draws from a stream of its own, but
    vLLM's kernels round otherwise in other batches, so a resumed run need not repeat to the token. With stop strings
    and `min_new_tokens` together, stop strings count from `min_new_tokens` on too. `gpu_memory_utilization` is the
    share of the GPU that vLLM may have while it answers, `max_model_len` the most tokens of prompt and answer (the
    model's own limit when left out, for which there must be room); `enforce_eager` goes without CUDA graphs.
    """
    from rlhf.rollout import vllm as vllm_engine

    return vllm_engine.answer(
        model, prompts, seeds, sampling, chat, stop_ids(model, chat),
        gpu_memory_utilization=gpu_memory_utilization, max_model_len=max_model_len, enforce_eager=enforce_eager,
    )  # fmt: skip


def _refuse_what_it_lacks(name: str, sampling: SamplingParams) -> None:
    for option in unsupported_options(name, sampling):
        raise UserError(f"rollout.{option}: the sampler `{name}` cannot do that", remedy="Use the sampler hf.")


def unsupported_options(name: str, options: Any) -> list[str]:
    """Which of the options that are set (on a `Sampling`, or a config with the same names) a sampler cannot follow."""
    return [option for option in SAMPLERS[name].traits.get("lacks", ()) if getattr(options, option)]
