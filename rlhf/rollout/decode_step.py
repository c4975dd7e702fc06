"""One decoding step of a model: an ordinary forward pass, or the replay of a CUDA graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from rlhf.core.errors import UserError

StepKind = Literal["eager", "cuda_graph"]
NextLogits = Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]


def next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits float32 [B, V] of the token after `ids`, int64 [B, T], given a transformers cache."""
    inputs = {"attention_mask": mask, "position_ids": positions, cache_name(model): cache}
    if STATE in inputs and ids.shape[1] == 1:  # Mamba's mask is for the tokens of this pass alone, not for the cache's
        inputs["attention_mask"] = None
    last = ids.shape[1] - 1
    # By its index: a slice of several positions is not contiguous, for which torch's product on a CPU copies the head's
    # weight once for every row of the batch.
    keep = torch.tensor([last], device=ids.device) if last else 1
    logits: Tensor = model(input_ids=ids, **inputs, use_cache=True, logits_to_keep=keep).logits[:, -1].float()
    return logits


KEYS, STATE = "past_key_values", "cache_params"
"""What families call the cache in their forward pass; those of Mamba take the second, and ignore the first."""


def cache_name(model: Any) -> str:
    """What the forward pass of a model, or of the model in a PEFT wrapper, calls its cache.

    Raises:
        UserError: It takes no cache of transformers.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cache_of(type(inner))  # type: ignore[arg-type]


def check_family(config: Any) -> None:
    """Refuse a family that cannot be sampled from, by its Hugging Face config and before its weights are loaded.

    Raises:
        UserError: See `cache_name`.
    """
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None:  # else the model comes with its own code
        cache_of(kind)


@cache
def cache_of(kind: Any) -> str:
    """`cache_name` of a class of models."""
    parameters = inspect.signature(kind.forward).parameters
    found = next((name for name in (KEYS, STATE) if name in parameters), None)
    if found is None:
        raise UserError(
            f"{kind.__name__} cannot be sampled from: it has no cache of transformers",
            "Its forward pass keeps what it has read in a form of its own, which the samplers do not know.",
            "SFT, reward model and export work; for PPO and sampling use another model.",
        )
    return found


def make_step(kind: StepKind, device: torch.device) -> NextLogits:
    """The decoding step of one rollout.

    Raises:
        UserError: `cuda_graph` on a device other than CUDA.
    """
    if kind == "eager":
        return next_logits
    if device.type != "cuda":
        raise UserError(
            f"rollout.sampler: step `cuda_graph` needs a CUDA device, and the policy is on `{device.type}`",
            remedy="Leave `step` out.",
        )
    return GraphStep()


class GraphStep:
    """`next_logits` as a CUDA graph, replayed without launching each operation.

    The graph is recorded again whenever a tensor that it reads or writes has moved or changed shape, so the KV cache
    must be a `kv_cache.FixedCache`. Not run on a GPU yet.
    """

    def __init__(self) -> None:
        self.addresses: list[tuple[int, torch.Size]] = []
        self.graph: Any = None
        self.logits = torch.empty(0)

    def __call__(self, model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """As `next_logits`; the next call overwrites the result."""
        tensors = [ids, mask, positions, *(t for layer in cache.layers for t in (layer.keys, layer.values))]
        addresses = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
        if addresses != self.addresses:
            self._record(model, ids, mask, positions, cache)
            self.addresses = addresses
        self.graph.replay()
        return self.logits

    def _record(self, *arguments: Any) -> None:
        self.graph = None  # frees its memory before the new graph needs some
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate memory in their first calls, which no graph may record
            for _ in range(2):
                next_logits(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # `thread_local`: other threads (NCCL's) may use CUDA during the recording
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = next_logits(*arguments)
