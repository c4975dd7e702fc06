"""A vLLM engine that a trainer samples with: its settings, new weights, completions.

Used by the sampler `vllm` in the trainer's process, and by the server of `vllm-server`, whose environment may hold
nothing but vLLM: only light modules are imported here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from rlhf.core.errors import UserError
from rlhf.rollout.types import Completion, SamplingParams

CPU_CACHE_GIB = 1.0
"""Size of the KV cache on a CPU. vLLM's own default is a fraction of the memory of the host."""


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 allows as the largest rank (`vllm.config.lora.MaxLoRARanks`)."""
ADAPTER = "adapter_model.safetensors"
_NUMBERS = count(1)
"""vLLM caches adapters by their id, so every version has a new one."""


def engine_options(
    model: str, sequences: int, dtype: str, *, gpu_memory_utilization: float, max_model_len: int | None,
    enforce_eager: bool, kv_cache_gib: float | None, lora_rank: int = 0, lora_modules: Sequence[str] = (),
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
        lora_rank: The largest rank of a LoRA adapter that comes without the base; 0 is no adapter.
        lora_modules: Last parts of the names of the layers that the adapter may change; empty for all.
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
        "worker_extension_cls": "rlhf.rollout.vllm_engine.WeightUpdates",
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        **(_lora_options(lora_rank, lora_modules) if lora_rank else {}),
    }


def _lora_options(rank: int, modules: Sequence[str]) -> dict[str, Any]:
    """Options for one adapter, its rank rounded up to one that vLLM allows; none if it is above the largest."""
    step = next((step for step in LORA_RANKS if step >= rank), None)
    if step is None:
        return {}
    targets = {"lora_target_modules": list(modules)} if modules else {}
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": step, **targets}


def lora_rank(llm: Any) -> int:
    """The largest rank of an adapter that an engine takes; 0 if it takes none."""
    config = llm.llm_engine.vllm_config.lora_config
    return 0 if config is None else int(config.max_lora_rank)


def start(**settings: Any) -> Any:
    """vLLM's `LLM`; without adapters, whatever the settings say, if vLLM's class of the model does not support LoRA.

    Raises:
        UserError: vLLM cannot run the model or the settings, or has no code of its own for the model.
    """
    import vllm

    try:
        if settings.get("enable_lora") and not _takes_adapters(settings):
            settings = {key: value for key, value in settings.items() if "lora" not in key}
        llm = vllm.LLM(**settings)
    except (ValueError, NotImplementedError) as error:  # what vLLM raises for models and settings that it cannot run
        raise UserError("rollout.sampler: vLLM does not start", str(error), "Use the sampler hf.") from error
    _check_architecture(llm)
    return llm


def when_a_process_dies(llm: Any, call: Callable[[], None]) -> None:
    """Call this, from another thread, once one of the engine's own processes (tensor parallelism) has died."""
    _executor(llm).register_failure_callback(call)


def lost_a_process(llm: Any) -> bool:
    """Whether one of the engine's own processes has died, after which it answers nothing."""
    return bool(getattr(_executor(llm), "is_failed", False))  # an engine in one process has no such field


def _executor(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor


def _takes_adapters(settings: dict[str, Any]) -> bool:
    """Whether vLLM's class of the model supports LoRA."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry, supports_lora

    known = EngineArgs.__dataclass_fields__.keys()
    config = EngineArgs(**{key: value for key, value in settings.items() if key in known}).create_model_config()
    return bool(supports_lora(ModelRegistry.resolve_model_cls(config.architectures, config)[0]))


def _check_architecture(llm: Any) -> None:
    """Refuse an engine that runs transformers' code, vLLM's fallback, which accepts new weights without using them.

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
    llm: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, ends: list[int],
    tokens: int, adapter: Path | None = None,
) -> list[Completion]:  # fmt: skip
    """Completions of a vLLM engine with the weights that it has.

    Args:
        llm: vLLM's `LLM`.
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: Length limits, temperature, top_k, top_p, stop strings.
        ends: Token ids that end a completion.
        tokens: One more than the tokenizer's highest id. Ids from there on are never sampled: the trainer's head masks
            them, and that mask is not a weight, so vLLM does not have it.
        adapter: Folder with ADAPTER, a safetensors file of `rlhf.tuning.lora_weights`; the engine has it for this call.
    """
    if not prompts:
        return []
    import vllm
    from vllm.lora.request import LoRARequest

    request = None
    if adapter is not None:
        _describe_adapter(adapter)
        number = next(_NUMBERS)
        request = LoRARequest(str(number), number, str(adapter))
    rows = llm.llm_engine.model_config.get_vocab_size()
    known: dict[str, Any] = {"allowed_token_ids": list(range(tokens))} if rows > tokens else {}
    outputs = llm.generate(
        [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        [vllm.SamplingParams(**sampling_params(sampling, seed, ends), **known) for seed in seeds],
        use_tqdm=False,
        lora_request=request,
    )
    if request is not None:
        llm.llm_engine.remove_lora(request.lora_int_id)
    return [_completion(request.outputs[0]) for request in outputs]


def _describe_adapter(folder: Path) -> None:
    """Write the config of PEFT that vLLM reads. The scale is in the weights, so alpha is the rank."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER, "pt") as file:
        names = [name for name in file.keys() if name.endswith(".lora_A.weight")]  # noqa: SIM118
        rank = max(file.get_slice(name).get_shape()[0] for name in names)
    layers = sorted({name.split(".")[-3] for name in names})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


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


# ---- new weights -------------------------------------------------------------------------------------------------


class WeightUpdates:
    """Methods for `LLM.collective_rpc`."""

    def replace_weights(self, weights: Iterable[tuple[str, Any]] | None = None, folder: str | None = None) -> None:
        """Replace the weights.

        Args:
            weights: Names as in a checkpoint of transformers, and tensors; or else
            folder: A folder with safetensors files. Each worker reads its part of them.
        """
        worker: Any = self
        worker.reload_weights(weights_iterator=_read(Path(folder)) if folder else weights)
        for module in worker.model_runner.get_model().modules():  # layers with adapters have another `apply`
            _repack(module)


def _repack(layer: Any) -> None:
    """Renew a head's repacked weight. vLLM's CPU kernels keep copies in their own layout, and vLLM 0.32 does not renew
    that of a head tied to the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
        layer.quant_method.process_weights_after_loading(layer)


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the safetensors files of a folder, in the order of the files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
