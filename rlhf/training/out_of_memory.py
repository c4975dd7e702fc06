"""Running out of memory in a pass of an optimizer step: gradients and activations are freed, so that the step can be
repeated in smaller passes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.training.engine import Engine

T = TypeVar("T")
SIGNS = ("DefaultCPUAllocator", "bad_alloc", "STATUS_ALLOC_FAILED")
"""Texts of the RuntimeErrors of torch's allocator on a CPU, of C++, and of cuBLAS and its kin."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed.

    On a CPU this happens only under a limit of the process (`ulimit -v`): else Linux or the container kills it.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def passes_that_fit(engine: Engine, passes: Callable[[], T], less: str) -> T | None:
    """Run the forward and backward passes of an optimizer step, before `engine.step`. Every rank calls it.

    Args:
        engine: It accumulates the gradients.
        passes: Runs the passes.
        less: A config override that makes the passes smaller, for the error: `batch.micro_batch_size=4`.

    Returns:
        What `passes` returned. None, on all ranks, if a rank ran out of memory: then the gradients and activations of
        all passes are freed. The weights are unchanged.

    Raises:
        UserError: Memory ran out, and the engine cannot repeat passes.
    """
    done: T | None = None
    try:
        done = passes()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not engine.repeatable:
            raise UserError(
                f"out of memory in a forward or backward pass ({str(error).splitlines()[0]})",
                f"Under ZeRO stage {engine.stage} ranks exchange gradients within a pass, so this step cannot be "
                "repeated with smaller passes.",
                f"Continue from the last checkpoint with smaller ones: --resume {less}",
            ) from None
    if not engine.repeatable or not distributed.any_rank(done is None):
        return done
    engine.forget()
    gc.collect()  # the failed pass's graph
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
