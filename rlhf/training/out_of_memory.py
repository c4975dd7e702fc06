"""Running out of memory in a pass: which errors say so, and what is freed before the pass is repeated."""

from __future__ import annotations

import gc

import torch

from rlhf.core.errors import UserError

SIGNS = ("DefaultCPUAllocator", "bad_alloc", "STATUS_ALLOC_FAILED")
"""Texts of the RuntimeErrors of torch's allocator on a CPU, of C++, and of cuBLAS and its kin."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed.

    On a CPU this happens only under a limit of the process (`ulimit -v`): else Linux or the container kills it.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def refuse_other_errors(error: BaseException, stage: int, repeatable: bool, smaller: str) -> None:
    """Pass if a pass ran out of memory and can be repeated.

    Args:
        error: What the pass raised.
        stage: The engine's ZeRO stage.
        repeatable: Whether its passes can be repeated.
        smaller: A config override that makes the passes smaller.

    Raises:
        UserError: Memory ran out, and the pass cannot be repeated.
        BaseException: Another error, as it is.
    """
    if not is_out_of_memory(error):
        raise error
    if not repeatable:
        raise UserError(
            f"out of memory in a forward or backward pass ({str(error).splitlines()[0]})",
            f"Under ZeRO stage {stage} ranks exchange gradients within a pass, so this step cannot be "
            "repeated with smaller passes.",
            f"Continue from the last checkpoint with smaller ones: --resume {smaller}",
        ) from None


def free_memory() -> None:
    """Free the graph of a pass that failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
