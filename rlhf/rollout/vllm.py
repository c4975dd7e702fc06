"""The sampler `vllm`: a vLLM engine in the trainer's process, on its GPU.

Written against the source of vLLM 0.33 (LLM, SamplingParams, `reload_weights`, sleep mode); it has not been run yet.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import distributed
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.vocabulary import token_count
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.tuning.merging import merged_weights


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: SamplingParams,
    chat: ChatTokenizer,
    ends: list[int],
    **options: Any,
) -> list[Completion]:
    """A completion for each prompt, in order. Every rank calls it, even without prompts, with full weights.

    Args:
        model: A causal LM (PEFT wrappers allowed).
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: Length limits, temperature, top_k, top_p, stop strings, batch size.
        chat: vLLM loads its tokenizer's folder to decode stop strings.
        ends: Token ids that end a completion.
        options: For vLLM's `LLM`.
    """
    import vllm

    llm = _engine(model.config.name_or_path, chat.tokenizer.name_or_path, sampling.batch_size, **options)
    # Sleep level 2 has dropped the weights, so they are sent again before each rollout, layer by layer.
    llm.wake_up(tags=["weights"])
    with torch.no_grad():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    outputs: list[Any] = []
    # the head's own mask of ids beyond the tokenizer is no weight, so vLLM does not get it
    tokens, rows = token_count(chat.tokenizer), model.config.get_text_config().vocab_size
    known: dict[str, Any] = {"allowed_token_ids": list(range(tokens))} if rows > tokens else {}
    if prompts:
        outputs = llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [vllm.SamplingParams(**sampling_params(sampling, seed, ends), **known) for seed in seeds],
            use_tqdm=False,
        )
    llm.sleep(level=2)
    return [_completion(request.outputs[0]) for request in outputs]


@functools.cache
def _engine(path: str, tokenizer: str, sequences: int, **options: Any) -> Any:
    """The sleeping engine of this process, made at the first rollout."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are in this process
    import vllm

    with torch.random.fork_rng():  # vLLM seeds the global generator
        llm = vllm.LLM(
            model=path,
            tokenizer=tokenizer,
            load_format="dummy",  # the weights come from the trainer
            tensor_parallel_size=1,
            # Under torchrun a process group exists already; each rank has its own engine within it.
            distributed_executor_backend="external_launcher" if distributed.world_size() > 1 else "uni",
            enable_sleep_mode=True,
            max_num_seqs=sequences,
            logprobs_mode="processed_logprobs",  # after the temperature (raw log-probs are before it)
            **options,
        )
    llm.sleep(level=2)
    return llm


def sampling_params(sampling: SamplingParams, seed: int, ends: list[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one completion."""
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
        "logprobs": 0 if sampling.plain else None,  # 0: of the sampled token only
    }


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = None
    if output.logprobs is not None:
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids)]
    return Completion(ids, output.finish_reason == "stop", logprobs)
