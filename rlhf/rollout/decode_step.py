"""One decoding step of a model: an ordinary forward pass, or the replay of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.rollout.kv_cache import next_logits

StepKind = Literal["eager", "cuda_graph"]
NextLogits = Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]


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
