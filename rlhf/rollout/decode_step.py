"""One decoding step of a model: called as it is, compiled, or recorded as a CUDA graph and replayed. See `Step`.

The last two run over a `kv_cache.FixedCache`: what they were made for is tensors of one size, in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.core.errors import UserError

Step = Literal["eager", "compiled", "cuda_graph"]
"""`eager`: over a cache that grows with the answers. `compiled`: torch.compile over a cache of fixed size, for each
number of sequences once. `cuda_graph`: over such a cache, recorded once per rollout and number of sequences, then
replayed without launching each operation; on a GPU alone."""

NextLogits = Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]


def next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """float32 [B, V]: the logits of the tokens after `ids`, int64 [B, T], over a transformers cache."""
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1].float()  # fmt: skip
    return logits


MOST_GRAPHS = 64
"""Beyond which torch goes on uncompiled; not reached, for rows come by halves and sizes of caches by 64."""


def make_step(kind: Step, device: torch.device) -> NextLogits:
    """How the steps of one rollout are taken.

    Raises:
        UserError: A CUDA graph on another device.
    """
    if kind == "eager":
        return next_logits
    if kind == "compiled":
        return _call_compiled
    if device.type != "cuda":
        raise UserError(
            f"rollout.sampler: step `cuda_graph` needs a CUDA device, and the policy is on `{device.type}`",
            remedy="Leave `step` out, or take `compiled`.",
        )
    return Recorded()


@functools.cache
def _compiled() -> NextLogits:
    return torch.compile(next_logits, dynamic=False)  # once it is asked for: the compiler takes 50 MB


def _call_compiled(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    # whoever keeps other compiled parts (`compile`) eager in a rollout does not mean this one
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        return _compiled()(model, ids, mask, positions, cache)


class Recorded:
    """Steps replayed from a CUDA graph, recorded anew when a tensor that it reads or writes has moved.

    NOT YET RUN: no GPU was at hand.
    """

    def __init__(self) -> None:
        self.places: list[tuple[int, torch.Size]] = []
        self.graph: Any = None
        self.logits = torch.empty(0)

    def __call__(self, model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """As `next_logits`; the result is overwritten by the next call."""
        held = [ids, mask, positions, *(t for layer in cache.layers for t in (layer.keys, layer.values))]
        places = [(tensor.data_ptr(), tensor.shape) for tensor in held]
        if places != self.places:
            self._record(model, ids, mask, positions, cache)
            self.places = places
        self.graph.replay()
        return self.logits

    def _record(self, *arguments: Any) -> None:
        self.graph = None  # its memory first
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate at their first calls; a step may be repeated
            for _ in range(2):
                next_logits(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's) may go on meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = next_logits(*arguments)
