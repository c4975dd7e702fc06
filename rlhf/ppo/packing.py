"""Whether a run's models can have several sequences in one row without padding."""

from __future__ import annotations

import torch

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.models.packed_attention import KERNEL, PACKED, VARLEN, switch
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.models import Models
from rlhf.training.engine import Engine


def can_pack(models: Models, vocab_size: int, wanted: bool | None) -> bool:
    """Whether micro-batches are packed; tested on two short sequences. Every rank calls it together.

    If so, models with the attention `sdpa` get `sdpa_packed` on a CPU.

    Args:
        models: The models of the run.
        vocab_size: The policy's vocabulary size.
        wanted: True, False, or None for where it is known to be faster: an attention with variable lengths, or `sdpa`
            on a CPU.

    Raises:
        UserError: Packing is wanted, but packed sequences attend to each other in this model.
    """
    policy, engine = models.policy, models.engine
    attention = policy.config._attn_implementation
    one_by_one = attention == "sdpa" and distributed.device().type == "cpu" and hasattr(torch.ops.aten, KERNEL)
    if wanted is False or (wanted is None and not one_by_one and attention not in VARLEN):
        return False
    switched = [engine.module, *models.frozen] if one_by_one else []
    for model in switched:
        switch(model, "sdpa", PACKED)
    separated = _separated(engine, vocab_size)
    if not separated:
        for model in switched:
            switch(model, PACKED, "sdpa")
    if wanted and not separated:
        raise UserError(
            f"batch.packing: with attention {attention!r}, packed sequences of {type(policy).__name__} attend to each"
            " other",
            remedy="Leave batch.packing out: padding of similar lengths costs little.",
        )
    return separated


@torch.no_grad()
def _separated(engine: Engine, vocab_size: int) -> bool:
    """Whether two packed sequences get the same log-probs and values as one sequence per row."""
    ids = [(place * 37 + 11) % vocab_size for place in range(9)]
    rows = [(ids[:4], [False, True, True, True]), (ids[4:], [False, True, True, True, True])]
    try:
        packed, padded = (
            engine(*TokenRows(rows, 0, vocab_size, packed).micro_batches([[[0, 1]]] * distributed.world_size()), 1.0)
            for packed in (True, False)
        )
    except Exception:  # families raise different errors for lengths in place of a mask
        return False
    precision = max(1e-5, 8 * torch.finfo(engine.dtype).eps)
    pairs = [(packed.logprobs, padded.logprobs), (packed.values, padded.values)]
    return all(torch.allclose(a, b, rtol=0, atol=precision * float(b.abs().max())) for a, b in pairs if b is not None)
