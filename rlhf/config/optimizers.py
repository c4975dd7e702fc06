"""The table of optimizers, which all stages share, and what each of them works with.

A row makes a torch optimizer of parameter groups and `betas`, `eps` and `weight_decay`. Traits:
    state: Bytes of optimizer state for a trained tensor of a given shape, besides the weight and its gradient.
    unused: Keys of the config's group `optimizer` that the algorithm does not use.
    flat: Whether a flat part of many tensors may be updated as if it were one tensor, as ZeRO does.
    needs: A Python package outside of the project's own requirements, or None.
    scratch: Temporary float32 tensors in a step, each as large as the largest trained one.
    host: Whether its weights and state must be in host memory (`offload_optimizer`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from rlhf.core.errors import UserError, need_package
from rlhf.core.lazy import torch
from rlhf.core.table import Pick, Table

OPTIMIZERS = Table("optimizer")
_USUAL: dict[str, Any] = {"unused": (), "flat": True, "needs": None, "scratch": 0, "host": False}
Groups = list[dict[str, Any]]
"""`{"params": [...], "lr": float}`, and optionally a `weight_decay` of their own."""

SMALLEST_8BIT, BLOCK = 4096, 256
"""bitsandbytes quantizes the state of tensors of at least this many elements, with one float32 scale for each block."""


def _two_moments(shape: Sequence[int]) -> float:
    return 8.0 * math.prod(shape)


def _two_moments_in_8_bits(shape: Sequence[int]) -> float:
    count = math.prod(shape)
    return 8.0 * count if count < SMALLEST_8BIT else 2.0 * (count + 4 * math.ceil(count / BLOCK))


def _rows_and_columns(shape: Sequence[int]) -> float:
    if len(shape) < 2:
        return 4.0 * math.prod(shape)
    return 4.0 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


@OPTIMIZERS.row("adamw", state=_two_moments, **_USUAL)
def adamw(groups: Groups, **adam: Any) -> Any:
    """AdamW (Loshchilov and Hutter, 2019): 8 bytes of state for a trained weight."""
    # The fused kernel needs no temporary tensors of the size of the weights.
    return torch.optim.AdamW(groups, **adam, fused=True)


@OPTIMIZERS.row("adamw-8bit", state=_two_moments_in_8_bits, **_USUAL | {"needs": "bitsandbytes"})
def adamw_8bit(groups: Groups, **adam: Any) -> Any:
    """AdamW with its moments in 8 bits, in blocks of 256 (Dettmers et al., 2022): 2 bytes; needs bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **adam)


@OPTIMIZERS.row("cpu-adam", state=_two_moments, **_USUAL | {"needs": "ninja", "host": True})
def cpu_adam(groups: Groups, **adam: Any) -> Any:
    """AdamW on host memory, DeepSpeed's C++ (compiled at the first start), under `offload_optimizer`."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, **adam, adamw_mode=True)
    optimizer.register_step_pre_hook(_compute_powers_again)
    return optimizer


def _compute_powers_again(optimizer: Any, *_: Any) -> None:
    """Make every step of a resumed run equal to that of an uninterrupted one, bit for bit.

    DeepSpeed's C++ gets beta^step by multiplying that of the step before, and with pow only after a jump (IncrementStep
    in deepspeed 0.19, csrc/includes/cpu_adam.h), so the first step after a resume would round differently. An update of
    nothing at step 0 is such a jump.
    """
    group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, *group["betas"], 1.0, 0.0, True, *nothing)


@OPTIMIZERS.row(
    "adafactor", state=_rows_and_columns, **_USUAL | {"unused": ("betas", "eps"), "flat": False, "scratch": 2}
)
def adafactor(
    groups: Groups, *, decay: Annotated[float, Field(gt=0, le=1)] = 0.8, clip: Annotated[float, Field(gt=0)] = 1.0,
    **adam: Any,
) -> Any:  # fmt: skip
    """Adafactor (Shazeer and Stern, 2018), without momentum: one number for each row and column of a matrix.

    Learning rates mean what they mean for AdamW: neither the paper's relative step nor its scale by the weights is
    used. `decay`: the second moment's decay rate is 1 - step^-decay (section 7.2); `clip`: the largest root mean square
    of a tensor's update before the learning rate (section 6).
    """
    from transformers.optimization import Adafactor

    usual = {"scale_parameter": False, "relative_step": False, "weight_decay": adam["weight_decay"]}
    return Adafactor(groups, clip_threshold=clip, decay_rate=-decay, **usual)


def refuse_optimizer(pick: Pick, settings: Mapping[str, Any] | None, bfloat16: bool, installed: bool = True) -> None:
    """Refuse what the optimizer does not work with, before anything is loaded.

    Args:
        pick: The optimizer.
        settings: DeepSpeed's settings; None for plain torch.
        bfloat16: Whether the compute dtype is bfloat16.
        installed: Whether its package must be installed here.

    Raises:
        UserError: A package is missing, the ZeRO stage would change the algorithm, or host memory is needed.
    """
    traits, key = pick.row.traits, f"optimizer.algorithm: {pick.name}"
    if installed and traits["needs"]:
        need_package(traits["needs"], key, "pip install 'rlhf-rankings[optimizers]', or use adamw.")
    zero = (settings or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if settings is not None and not traits["flat"] and (stage > 0 or bfloat16):
        how = f"ZeRO stage {stage}" if stage else "DeepSpeed in bfloat16"
        raise UserError(
            f"{key} does not work under {how}",
            "There each process updates one flat part of all weights, which has no rows and columns: the state would"
            " not be smaller, and the result would depend on the number of processes.",
            "Use adamw-8bit or adamw; or one process without a DeepSpeed file; or stage 0 with precision=float32.",
        )
    if traits["host"] and "offload_optimizer" not in zero:
        raise UserError(
            f"{key} updates weights in host memory, and no DeepSpeed file with `offload_optimizer` keeps them there",
            remedy="Set deepspeed=configs/deepspeed/zero2-offload.json (or zero3-offload.json), or use adamw.",
        )
