"""Sequences in one row without padding: which models keep them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.models.packed_attention import KERNEL, PACKED, VARLEN, switch
from rlhf.ppo.batching import Batcher
from rlhf.training.engine import Engine


def packs(engine: Engine, reference: Any, vocab_size: int, wanted: bool | None) -> bool:
    """Whether micro-batches are to be packed; tried out on two short sequences. Every rank asks together.

    Where they are, models with the attention `sdpa` get `sdpa_packed` on a CPU.

    Args:
        engine: Of policy and critic.
        reference: What gives the reference's log-probs: a frozen model, or something that asks the engine.
        vocab_size: Of the policy.
        wanted: True, False, or None for wherever that is known to pay: an attention with variable lengths, or `sdpa`
            on a CPU.

    Raises:
        UserError: Packing is wanted, and the model lets packed sequences see each other.
    """
    policy: Any = engine.module.policy
    attention = policy.config._attn_implementation
    one_by_one = attention == "sdpa" and distributed.device().type == "cpu" and hasattr(torch.ops.aten, KERNEL)
    if wanted is False or (wanted is None and not one_by_one and attention not in VARLEN):
        return False
    models = [model for model in (engine.module, reference) if one_by_one and isinstance(model, nn.Module)]
    for model in models:
        switch(model, "sdpa", PACKED)
    apart = _apart(engine, vocab_size)
    if not apart:
        for model in models:
            switch(model, PACKED, "sdpa")
    if wanted and not apart:
        raise UserError(
            f"batch.packing: with attention {attention!r}, {type(policy).__name__} lets packed sequences see others",
            remedy="Leave batch.packing out: padding of similar lengths costs little.",
        )
    return apart


@torch.no_grad()
def _apart(engine: Engine, vocab_size: int) -> bool:
    """Whether two packed sequences get the same log-probs and values as in rows of their own."""
    ids = [(place * 37 + 11) % vocab_size for place in range(9)]
    rows = [(ids[:4], [False, True, True, True]), (ids[4:], [False, True, True, True, True])]
    try:
        packed, padded = (
            engine(*Batcher(rows, 0, vocab_size, packed).share([[[0, 1]]] * distributed.world_size()), 1.0)
            for packed in (True, False)
        )
    except Exception:  # each family refuses lengths in the place of a mask with an error of its own
        return False
    precision = max(1e-5, 8 * torch.finfo(engine.dtype).eps)
    pairs = [(packed.logprobs, padded.logprobs), (packed.values, padded.values)]
    return all(torch.allclose(a, b, rtol=0, atol=precision * float(b.abs().max())) for a, b in pairs if b is not None)
