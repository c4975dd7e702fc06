"""`rlhf serve-sampler`: a vLLM engine for the rollouts of a PPO run with the sampler `vllm-server`."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from typing import Annotated

import typer

from rlhf.cli import options
from rlhf.core.console import say, warn
from rlhf.core.errors import UserError
from rlhf.runs.parents import resolve_model_path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def command(
    model: options.Model,
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8910,
    tensor_parallel: options.Positive = 1,
    dtype: str = "auto",
    sequences: options.Positive = 256,
    max_model_len: options.PositiveOrNone = None,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.01, max=0.99)] = 0.9,
    kv_cache_gib: float | None = None,
    lora_rank: options.NotNegative = 0,
    enforce_eager: bool = False,
) -> None:
    """Serve a model to PPO runs with `rollout.sampler={name: vllm-server, url: ...}`, one run at a time.

    Only the model's config and tokenizer are read; the run sends the weights. Every request needs the token in the
    environment variable RLHF_SAMPLER_TOKEN, which is generated and printed if it is not set.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 is any free one.
        tensor_parallel: Number of GPUs that the model is divided over.
        dtype: auto, bfloat16, float16 or float32; the trainer's precision.
        sequences: Most sequences decoded at a time.
        max_model_len: Most tokens of prompt and answer; by default the model's limit.
        gpu_memory_utilization: Fraction of each GPU's memory.
        kv_cache_gib: Size of the KV cache; on a CPU 1 by default.
        lora_rank: Accept LoRA adapters of up to this rank without the base; 0: merged weights only.
        enforce_eager: No CUDA graphs, no compilation.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rlhf serve-sampler: vLLM is not installed",
            remedy="Install it in an environment of its own, since it pins torch, and run this command there.",
        )
    folder = resolve_model_path(model)
    from rlhf.rollout.vllm_server import TOKEN, serve  # imports torch

    token = os.environ.pop(TOKEN, "")
    if not token:
        token = secrets.token_urlsafe(32)
        say(f"export {TOKEN}={token}")
    if host not in LOOPBACK:
        warn(f"--host {host}: weights and answers cross the network unencrypted; use a network that you trust")

    def ready(port: int) -> None:
        say(f"Serving on http://{host}:{port}")
        sys.stdout.flush()  # a reader of a pipe waits for this line

    settings = {
        "model": folder, "sequences": sequences, "dtype": dtype, "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len, "enforce_eager": enforce_eager, "kv_cache_gib": kv_cache_gib,
        "lora_rank": lora_rank,
    }  # fmt: skip
    serve(settings, host, port, tensor_parallel, token, ready)
