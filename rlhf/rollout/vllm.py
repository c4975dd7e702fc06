"""vLLM in the trainer's process, on its GPU: what the sampler `vllm` runs.

Written against vLLM 0.33 (LLM, SamplingParams, `reload_weights`, sleep mode), by reading; it has not been run yet.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import distributed
from rlhf.data.chat import ChatTokenizer
from rlhf.models.merging import merged_weights
from rlhf.rollout.types import Completion, SamplingParams


def answer(
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: SamplingParams,
    chat: ChatTokenizer,
    ends: list[int],
    **options: Any,
) -> list[Completion]:
    """As a row of SAMPLERS does. Every rank calls it, with the weights whole, prompts or not.

    Args:
        model: A causal LM (PEFT wrappers allowed).
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: How to draw.
        chat: Its tokenizer's folder is where vLLM finds the tokens of stop strings.
        ends: Token ids that end an answer.
        options: For vLLM's `LLM`.
    """
    import vllm

    llm = _engine(model.config.name_or_path, chat.tokenizer.name_or_path, sampling.batch_size, **options)
    # Level 2 of sleep has dropped the weights, so they are sent before each rollout, layer after layer.
    llm.wake_up(tags=["weights"])
    with torch.no_grad():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    found: list[Any] = []
    if prompts:
        found = llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [vllm.SamplingParams(**sampling_params(sampling, seed, ends)) for seed in seeds],
            use_tqdm=False,
        )
    llm.sleep(level=2)
    return [_answer(request.outputs[0]) for request in found]


@functools.cache
def _engine(path: str, tokenizer: str, sequences: int, **options: Any) -> Any:
    """The engine of this process, asleep; made at the first rollout."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    import vllm

    with torch.random.fork_rng():  # vLLM seeds the whole process
        llm = vllm.LLM(
            model=path,
            tokenizer=tokenizer,
            load_format="dummy",  # the weights come from the trainer
            tensor_parallel_size=1,
            # Under torchrun there is a process group already, in which each rank's engine is one of its own.
            distributed_executor_backend="external_launcher" if distributed.world_size() > 1 else "uni",
            enable_sleep_mode=True,
            max_num_seqs=sequences,
            logprobs_mode="processed_logprobs",  # after the temperature; the raw ones are before it
            **options,
        )
    llm.sleep(level=2)
    return llm


def sampling_params(sampling: SamplingParams, seed: int, ends: list[int]) -> dict[str, Any]:
    """vLLM's SamplingParams for one answer, as keywords."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "stop_token_ids": ends,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop),
        "logprobs": 0 if sampling.plain else None,  # 0: of the chosen token alone
    }


def _answer(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids)]
    return Completion(ids, output.finish_reason == "stop", logprobs)
